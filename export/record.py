"""Recorded runs: what each network takes and gives in a real, short run of the torch reference.

A picture is made with DDIM in float32; the UNet's inputs are kept at an early, a middle and a late
noise level, the decoder's at the end of the run, the encoder's from the decoded picture. What the
variant is conditioned on is made first, by its own networks. Then each network runs once more at
the model's native size. One network is in memory at a time.

checked by  tests/parity/test_record.py
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.bundle import ModelFacts
from ..engine.ports import Array
from ..engine.spec import ComponentSpec, cut_of, features_name
from ..engine.weights import read_tensors
from . import conditions
from .components import Part
from .conditions import Conditions, resized
from .modules.ops import fused_attention
from .weights_file import read_weights

STEPS = 6
CORNER = 8  # latent cells
GUIDANCE = 7.5
SMALL_SIDE = 256  # pixels; a model of a smaller native size runs at that
DEPTH_SIDE = 128  # pixels of the depth network's small case, a multiple of 32
LEVELS = {0: "early", STEPS // 2: "middle", STEPS - 1: "late"}
NATIVE = "native"
PROMPTS = ("", "a photograph of an astronaut riding a horse")

Feeds = dict[str, Array]
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    """Inputs of one network, and what torch makes of them in float32.

    name        `early`, `middle`, `late`, `prompts`, `picture`; `native` at the model's own size
    outputs     the deep features of the UNet too: a shallow graph is fed with them
    bands       pieces of the network: what they take and give for a corner of the same picture
    """

    name: str
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    bands: Mapping[str, Case] = field(default_factory=dict)

    def dims(self, spec: ComponentSpec) -> dict[str, int]:
        """Sizes of the component's named dimensions in this case."""
        return {
            d: size
            for t in spec.inputs
            for d, size in zip(t.shape, self.feeds[t.name].shape, strict=True)
            if isinstance(d, str)
        }


Recording = Mapping[str, Sequence[Case]]


def record(
    parts: Sequence[Part],
    weights: Mapping[str, Path],
    facts: ModelFacts,
    ids: Array,
    report: Report,
) -> dict[str, list[Case]]:
    """component -> its cases, small ones first.

    weights     component -> its safetensors file
    ids         int64 [2, length]: the tokens of PROMPTS
    report      called with what is being done and the share that is done, 0..1
    """
    by_name = {p.name: p for p in parts}
    small, native = latent_sides(facts, SMALL_SIDE), latent_sides(facts, None)
    text_part, unet_part = by_name["text_encoder"], by_name["unet"]
    decoder, encoder = by_name["vae_decoder"], by_name["vae_encoder"]

    report("reference: text encoder", 0.0)
    with loaded(text_part, weights["text_encoder"]) as network:
        text = [run(text_part, network, "prompts", {"input_ids": ids})]
    made, further = _conditions(by_name, weights, facts, report)
    with loaded(unet_part, weights["unet"]) as network:
        hidden = text[0].outputs["last_hidden_state"]
        steps, latents = _sample(unet_part, network, facts, hidden, further, report)
    report("reference: decoder", 0.75)
    sizes = {"picture": latents}
    if native != small:
        sizes[NATIVE] = resized(latents[1:], native)
    with loaded(decoder, weights["vae_decoder"]) as network:
        decoded = [run(decoder, network, n, {"latent": z}) for n, z in sizes.items()]
    report("reference: encoder", 0.9)
    with loaded(encoder, weights["vae_encoder"]) as network:
        pictures = {c.name: np.clip(c.outputs["image"], -1, 1) for c in decoded}
        encoded = [run(encoder, network, n, {"image": x}) for n, x in pictures.items()]
    return {
        "text_encoder": text,
        "unet": steps,
        "vae_encoder": encoded,
        "vae_decoder": decoded,
        **made,
    }


def latent_sides(facts: ModelFacts, limit: int | None) -> tuple[int, int]:
    """Height and width of the latent of a picture at native size, or of `limit` pixels at most."""
    height, width = (s if limit is None else min(s, limit) for s in facts.native_size)
    return height // facts.latent.factor, width // facts.latent.factor


@contextmanager
def loaded(part: Part, file: Path) -> Iterator[nn.Module]:
    """The network with its weights in float32; its memory is given back afterwards."""
    module = part.empty().to_empty(device="cpu")
    prefix = len(part.prefix)
    own = read_weights(file) if not part.beside else _without(file, part.beside)
    weights = {name[prefix:]: tensor.float() for name, tensor in own}
    module.load_state_dict(weights, assign=True)
    del weights
    try:
        yield module
    finally:
        module.to("meta")
        free_memory()


def _without(file: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in read_weights(file) if name not in names)


def free_memory() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def run(part: Part, network: nn.Module, name: str, feeds: Feeds) -> Case:
    """One pass of a network with one output, its deep features beside that."""
    # Whole attention matrices of a UNet at 768x768 are 3.4 GB each, in float32.
    with torch.inference_mode(), fused_attention():
        given = {k: torch.from_numpy(v) for k, v in feeds.items()}
        features: dict[int, Tensor] = {}
        if part.features:
            cuts = [cut_of(t.name) for t in part.features]
            result, features = network.deep(**given, cuts=cuts)  # type: ignore[operator]
        else:
            result = network(**given)
    outputs = {part.spec.outputs[0].name: result.numpy()}
    outputs |= {features_name(k): x.numpy() for k, x in features.items()}
    return Case(name, feeds, outputs, {} if name == NATIVE else _bands(part, network, name, feeds))


def _bands(part: Part, network: nn.Module, name: str, feeds: Feeds) -> dict[str, Case]:
    """The pieces of a network in their order, each fed with what those before it gave.

    Statistics are those of the first map that the piece before gave, over all of it.
    """
    cases: dict[str, Case] = {}
    held: dict[str, Tensor] = {}
    last = torch.empty(0)
    for band in part.bands(network):
        if not cases:
            held = {n: _corner(part, torch.from_numpy(x)) for n, x in feeds.items()}
            held = dict(zip(band.given, held.values(), strict=True))
        given = {n: held[n] for n in band.given}
        if band.groups:
            given["statistics"] = _statistics(last, band.groups)
        with torch.inference_mode():
            results = band.module(**given)
        results = results if isinstance(results, tuple) else (results,)
        made = dict(zip(band.made, results, strict=True))
        last = next(iter(made.values()))
        if "h" in made:
            held = {"skip": held["x"], **made}
        elif "seen" not in made:
            held = made
        as_arrays = [{n: x.numpy() for n, x in xs.items()} for xs in (given, made)]
        cases[band.name] = Case(name, *as_arrays)
    return cases


def _corner(part: Part, x: Tensor) -> Tensor:
    """Of one picture, so small that the maps of all pieces fit into memory together."""
    side = CORNER * part.multiples.get(str(part.spec.inputs[0].shape[2]), 1)
    return x[:1, :, :side, :side].contiguous()


def _statistics(x: Tensor, groups: int) -> Tensor:
    """float32 [1, groups, 3]: the mean to eight bits, the rest of it, the variance."""
    flat = x.double().reshape(groups, -1)
    mean = flat.mean(1)
    high = mean.bfloat16().double()
    return torch.stack([high, mean - high, flat.var(1, correction=0)], 1)[None].float()


def _conditions(
    parts: Mapping[str, Part], weights: Mapping[str, Path], facts: ModelFacts, report: Report
) -> tuple[dict[str, list[Case]], Conditions]:
    """Cases of the variant's own networks, and what the UNet is conditioned on."""

    def ask(name: str, feeds: Sequence[tuple[str, Feeds]]) -> list[Case]:
        report(f"reference: {name.replace('_', ' ')}", 0.03)
        with loaded(parts[name], weights[name]) as network:
            return [run(parts[name], network, case, f) for case, f in feeds]

    if facts.variant == "inpainting":

        def encode(image: Array) -> Array:
            return ask("vae_encoder", [("", {"image": image})])[0].outputs["moments"]

        return {}, conditions.inpainting(facts, latent_sides(facts, SMALL_SIDE), encode)
    if facts.variant == "x4-upscaler":
        return {}, conditions.low_scale(facts)
    if "image_encoder" in parts:
        tower = ask("image_encoder", [("picture", {"pixels": conditions.pixels(facts)})])
        embedding = tower[0].outputs["embedding"][:1]
        statistics = read_tensors(weights["image_encoder"], parts["image_encoder"].beside)
        return {"image_encoder": tower}, conditions.unclip(facts, embedding, statistics)
    if "depth" in parts:
        sides = {"picture": DEPTH_SIDE, NATIVE: 16 * parts["depth"].config["grid"]}
        cases = ask("depth", [(n, {"image": conditions.picture(s, s)}) for n, s in sides.items()])
        return {"depth": cases}, conditions.depth(cases[0].outputs["depth"])
    if facts.variant == "depth":
        return {}, conditions.depth(None)
    return {}, Conditions()


def _sample(
    part: Part,
    network: nn.Module,
    facts: ModelFacts,
    hidden: Array,
    conditions: Conditions,
    report: Report,
) -> tuple[list[Case], Array]:
    """UNet cases, and two latents for the decoder: the middle step's guess and the last one.

    source      DDIM with eta = 0: Song et al. 2020, arXiv:2010.02502, equation 12
    """
    s = facts.schedule
    # float64: the whole table in double precision, as the runtime computes it
    betas = np.linspace(s.beta_start**0.5, s.beta_end**0.5, s.timesteps) ** 2
    alphas_bar = np.cumprod(1 - betas)
    times = np.linspace(s.timesteps - 1, s.timesteps // STEPS, STEPS).round().astype(int)
    random = np.random.default_rng(0)
    further = _inputs(conditions)
    x = _normal(random, (1, facts.latent.channels, *latent_sides(facts, SMALL_SIDE)))
    cases, guesses = [], []
    for i, t in enumerate(times):
        report(f"reference: UNet, step {i + 1} of {STEPS}", 0.05 + 0.55 * i / STEPS)
        case = run(part, network, LEVELS.get(i, ""), further(x, float(t), hidden))
        without, towards = case.outputs["out_sample"][:, : x.shape[1]].astype(np.float64)
        out = (without + GUIDANCE * (towards - without))[None]
        alpha, sigma = alphas_bar[t] ** 0.5, (1 - alphas_bar[t]) ** 0.5
        v = facts.prediction == "v"
        x0 = alpha * x - sigma * out if v else (x - sigma * out) / alpha
        eps = alpha * out + sigma * x if v else out
        after = alphas_bar[times[i + 1]] if i + 1 < STEPS else 1.0
        x = (after**0.5 * x0 + (1 - after) ** 0.5 * eps).astype(np.float32)
        if case.name:
            cases.append(case)
            guesses.append(x0)
    if (sides := latent_sides(facts, None)) != x.shape[2:]:
        report("reference: UNet at native size", 0.6)
        native = _normal(random, (1, facts.latent.channels, *sides))
        cases.append(run(part, network, NATIVE, further(native, s.timesteps / 2, hidden)))
    latents = np.concatenate([guesses[1], x]) / facts.latent.scale
    return cases, latents.astype(np.float32)


def _inputs(conditions: Conditions) -> Callable[[Array, float, Array], Feeds]:
    """A function that puts together all inputs of the UNet, for both halves of the guidance."""

    def feeds(x: Array, t: float, hidden: Array) -> Feeds:
        sides = (x.shape[2], x.shape[3])
        more = [] if conditions.channels is None else [conditions.channels(sides)]
        return {
            "sample": np.repeat(np.concatenate([x, *more], axis=1), 2, axis=0),
            "timestep": np.full(2, t, np.float32),
            "encoder_hidden_states": hidden,
            **conditions.labels,
        }

    return feeds


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.standard_normal(shape, np.float32)
