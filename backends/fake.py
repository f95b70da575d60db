"""Networks with known answers, without an engine library: for laws and tests of the engine.

text_encoder   a vector per row that depends on all of its ids
unet           the exact denoiser for one picture: every right sampler, from any noise and in any
               number of steps, ends at `picture(text)`; or, where `noise` is given, the network
               for which x stays on the line alpha c + sigma e. Its deep features are the picture
               c, which its shallow graphs take in the place of the text's
vae_decoder    the first three channels, squashed by tanh, every value a square of pixels
vae_encoder    its inverse
               in bands, both do so in their last band; those before it hand the cells on
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from ..engine.errors import BackendError
from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Profile, TensorSpec, is_band
from .base import GraphBackend, Run

Answer = Callable[[Mapping[str, Array], Graph], list[Array]]  # in the order of graph.outputs

FACTOR = 8
CERTAIN = -30.0  # log-variance: the reference clamps there


class Fake(GraphBackend):
    """calls       component, or component/graph where it is not `full` -> how often it ran
    prediction  what the UNet gives: eps or v
    image       float [C, h, w]: the picture, whatever the text; None: `picture(text)`
    noise       float [C, h, w]: the noise that the UNet sees, whatever x is; None: what x holds
    betas       first, last and number of the training betas, linear in their roots
    """

    name = "fake"
    whole = True

    def __init__(
        self,
        prediction: Literal["eps", "v"] = "eps",
        image: Array | None = None,
        noise: Array | None = None,
        betas: tuple[float, float, int] = (0.00085, 0.012, 1000),
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._prediction, self._image, self._noise = prediction, image, noise
        first, last, count = betas
        squared = np.linspace(first**0.5, last**0.5, count) ** 2
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-squared))

    def probe(self) -> Probe:
        return Probe(True, "known answers, for tests", precisions=("f32", "bf16"))

    def compile(self, component: Component, graph: Graph, profile: Profile) -> FakeNetwork:
        answers: dict[str, Answer] = {
            "text_encoder": _text,
            "unet": self._unet,
            "vae_encoder": _encode,
            "vae_decoder": _decode,
        }
        name = component.spec.name
        if is_band(graph.name):
            answers[name] = _band
        if name not in answers:
            raise BackendError(
                f"fake has no answers for {name!r}", hint=f"it has {', '.join(answers)}"
            )
        label = name if graph.name == "full" else f"{name}/{graph.name}"
        return FakeNetwork(label, graph, answers[name], self.calls, profile.paired)

    def _unet(self, feeds: Mapping[str, Array], graph: Graph) -> list[Array]:
        x = feeds["sample"][:, : _channels(graph)].astype(np.float64)
        log_alpha = np.interp(
            feeds["timestep"], np.arange(len(self._log_alphas)), self._log_alphas
        )[:, None, None, None]
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        cached = graph.inputs[-1].name
        if cached.startswith("features"):
            c = feeds[cached][:, : x.shape[1]].astype(np.float64)
        elif self._image is None:
            c = picture(feeds["encoder_hidden_states"], x.shape[1:])
        else:
            c = self._image
        e = (x - alpha * c) / sigma if self._noise is None else self._noise
        out = e if self._prediction == "eps" else alpha * e - sigma * c
        deep = [_widened(c, len(x), _size(t, 1)) for t in graph.outputs[1:]]
        return [np.broadcast_to(out, x.shape), *deep]


class FakeNetwork:
    """One function of named arrays."""

    def __init__(
        self,
        name: str,
        graph: Graph,
        answer: Answer,
        calls: Counter[str],
        paired: bool,
    ) -> None:
        self._name, self._graph, self._answer, self._calls = name, graph, answer, calls
        self._paired = paired

    def open(self, held: Mapping[str, Array]) -> Run:
        fixed = dict(held)

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            self._calls[self._name] += 1
            assert not self._paired or _in_pairs(feeds), "the profile says that rows are in pairs"
            results = self._answer(fixed | dict(feeds), self._graph)
            return {
                t.name: np.array(value, dtype=t.dtype)
                for t, value in zip(self._graph.outputs, results, strict=True)
            }

        return run

    def close(self) -> None:
        pass


def picture(text: Array, shape: tuple[int, ...]) -> Array:
    """The latents that a text [B, T, W] stands for: float64 [B, C, h, w], -1..1.

    Each channel leans its own way, so that swapped axes and flipped pictures show.
    """
    channels, height, width = shape
    colour = np.tanh(text[:, 0, np.arange(channels) % text.shape[2]])[:, :, None, None]
    y = np.linspace(-0.25, 0.25, height)[:, None]
    x = np.linspace(-0.125, 0.125, width)
    return np.asarray(0.6 * colour.astype(np.float64) + y + x)


def _in_pairs(feeds: Mapping[str, Array]) -> bool:
    halves = (np.split(feeds[name], 2) for name in ("sample", "timestep"))
    return all(np.array_equal(one, other) for one, other in halves)


def _widened(c: Array, batch: int, channels: int) -> Array:
    """A picture [C, h, w], or one for each row, as features: the channels behind C are zero."""
    features = np.zeros((batch, channels, *c.shape[-2:]), np.float32)
    features[:, : c.shape[-3]] = c
    return features


def _text(feeds: Mapping[str, Array], graph: Graph) -> list[Array]:
    ids = feeds["input_ids"]
    width = _channels(graph, axis=2)
    rows = []
    for row in ids:
        seed = hashlib.sha256(np.ascontiguousarray(row, dtype="<i8").tobytes()).digest()[:8]
        random = np.random.default_rng(int.from_bytes(seed, "little"))
        rows.append(random.standard_normal((len(row), width)))
    return [np.stack(rows)]


def _decode(feeds: Mapping[str, Array], graph: Graph) -> list[Array]:
    colours = np.tanh(feeds["latent"][:, :3])
    return [colours.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)]


def _band(feeds: Mapping[str, Array], graph: Graph) -> list[Array]:
    """The picture's channels among the map's; a side twice or half as large where it is to be."""
    given, last = graph.inputs[0], graph.outputs[0]
    x = feeds[given.name]
    if last.name == "image":
        return [np.tanh(x[:, :3])]
    if last.name == "moments":
        mean = np.arctanh(x[:, :3].clip(-0.999, 0.999))
        mean = _channelled(mean, _channels(graph) // 2)
        return [np.concatenate([mean, np.full_like(mean, CERTAIN)], axis=1)]
    if given.shape[2] != last.shape[2]:
        x = _halved(x) if last.shape[2] == "h" else x.repeat(2, axis=2).repeat(2, axis=3)
    return [_channelled(x, _size(t, 1)) for t in graph.outputs]


def _halved(x: Array) -> Array:
    batch, channels, height, width = x.shape
    return np.asarray(x.reshape(batch, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5)))


def _channelled(x: Array, channels: int) -> Array:
    """With so many channels: the first ones, or zeros behind them."""
    made = np.zeros((len(x), channels, *x.shape[2:]), np.float32)
    made[:, : x.shape[1]] = x[:, :channels]
    return made


def _encode(feeds: Mapping[str, Array], graph: Graph) -> list[Array]:
    image = feeds["image"]
    batch, channels, height, width = image.shape
    squares = image.reshape(batch, channels, height // FACTOR, FACTOR, width // FACTOR, FACTOR)
    mean = np.arctanh(squares.mean(axis=(3, 5)).clip(-0.999, 0.999))
    half = _channels(graph) // 2
    mean = np.concatenate([mean, np.zeros_like(mean[:, : half - channels])], axis=1)
    return [np.concatenate([mean, np.full_like(mean, CERTAIN)], axis=1)]


def _channels(graph: Graph, axis: int = 1) -> int:
    return _size(graph.outputs[0], axis)


def _size(tensor: TensorSpec, axis: int) -> int:
    size = tensor.shape[axis]
    assert isinstance(size, int), f"axis {axis} of {tensor} is not fixed"
    return size
