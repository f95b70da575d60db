"""From a request to pictures: encode, start, denoise, decode. The sessions are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from . import images, latents, metadata, schedule, solvers
from .bundle import Bundle
from .clock import Metered, stage
from .errors import RequestError
from .guidance import Guidance
from .loop import denoise
from .noise import TorchNoise
from .ports import Array, Floats, Sessions
from .request import Progress, Request, Timings
from .schedule import Training
from .table import Table
from .tasks import txt2img
from .tokenizer import Tokenizer

OnStep = Callable[[Progress], None]


@dataclass(frozen=True)
class Picture:
    """One result.

    image       RGB
    request     what makes this one picture again: its own seed, count 1
    latent      float32 [C, h, w], the scale in it
    about       what goes into the file beside the request: model, bundle, backend, precision, ...
    """

    image: Image.Image
    request: Request
    latent: Array
    about: dict[str, str]

    def save(self, path: Path | str) -> Path:
        """Write a PNG, JPEG or WebP, by the suffix, with everything needed to make it again."""
        return images.save(self.image, Path(path), self.text())

    def text(self) -> metadata.Metadata:
        return metadata.describe(self.request.to_dict(), self.about)


@dataclass
class Result:
    """What a run gives. `request` is the one that ran, with nothing left open."""

    request: Request
    pictures: list[Picture] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    warnings: list[str] = field(default_factory=list)

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.pictures[0].image

    @property
    def images(self) -> list[Image.Image]:
        return [p.image for p in self.pictures]


class Pipeline:
    """A bundle and its sessions, ready for requests. A context manager; close() frees the engines.

    about       backend, precision and the like, written into every picture
    """

    def __init__(self, bundle: Bundle, sessions: Sessions, about: dict[str, str]) -> None:
        self.bundle, self.facts = bundle, bundle.facts
        self.about = {"model": bundle.facts.name, "bundle": bundle.id,
                      "model_sha256": bundle.facts.source.sha256, **about}  # fmt: skip
        self._sessions = sessions
        self._tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
        noise = bundle.facts.schedule
        self._training = Training.scaled_linear(noise.beta_start, noise.beta_end, noise.timesteps)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sessions.close()

    def __call__(
        self, request: Request | None = None, /, *, on_step: OnStep | None = None, **fields: Any
    ) -> Result:
        """Run a Request, or the one that the keyword arguments make.

        on_step     called after each network call
        raises      RequestError, BackendError, NumericsError
        """
        *_, result = self.stream(request, on_step=on_step, **fields)
        return result

    def stream(
        self, request: Request | None = None, /, *, on_step: OnStep | None = None, **fields: Any
    ) -> Iterator[Result]:
        """As a call, but yields the same, growing Result after each batch of pictures."""
        txt2img.check(self.facts)
        asked = _request(request, fields)
        result = Result(asked.completed(self.facts.native_size))
        return self._batches(result, on_step)

    def _batches(self, result: Result, on_step: OnStep | None) -> Iterator[Result]:
        request, timings = result.request, result.timings
        sessions = Metered(self._sessions, timings)
        with _running(timings):
            shape = self._latent_shape(request, result.warnings)
            table = self._table(request, result.warnings)
            with stage(timings, "text"):
                uncond, cond = self._encode(sessions, request, result.warnings)
        for first in range(0, request.count, request.batch_size):
            with _running(timings):
                count = min(request.batch_size, request.count - first)
                streams = [TorchNoise(request.seed_of(first + k)) for k in range(count)]
                x = txt2img.start(table, streams, shape)
                predict = Guidance(sessions, *(_repeat(text, count) for text in (uncond, cond)))

                def noise(streams: list[TorchNoise] = streams) -> Array:
                    return np.stack([stream.normal(shape) for stream in streams])

                with stage(timings, "denoise"):
                    last = perf_counter()
                    for step in denoise(table, predict, x, noise):
                        x, now = step.x, perf_counter()
                        timings.rows.append(now - last)
                        if on_step is not None:
                            place = (first, request.count, step.row.index + 1, len(table))
                            on_step(Progress(*place, seconds=now - last))
                        last = perf_counter()
                with stage(timings, "decode"):
                    for k, latent in enumerate(x):
                        result.pictures.append(self._finish(sessions, request, first + k, latent))
            yield result

    def _encode(
        self, sessions: Metered, request: Request, warnings: list[str]
    ) -> tuple[Floats | None, Floats]:
        """Text of the negative prompt (None when no row is guided) and of the prompt, [1, T, W]."""
        prompts = {"prompt": request.prompt}
        if request.guidance != 1.0:
            prompts = {"negative prompt": request.negative_prompt, **prompts}
        encoded = {name: self._tokenizer.encode(text) for name, text in prompts.items()}
        for name, tokens in encoded.items():
            if tokens.dropped:
                room = self.facts.tokenizer.length - 2
                warnings.append(
                    f"the {name} is longer than {room} tokens; this was cut off: {tokens.dropped}"
                )
        ids = np.array([tokens.ids for tokens in encoded.values()], np.int64)
        session = sessions("text_encoder", {"B": len(ids)})
        text: Floats = session({"input_ids": ids})["last_hidden_state"]
        return (None if len(text) == 1 else text[:1]), text[-1:]

    def _table(self, request: Request, warnings: list[str]) -> Table:
        assert request.schedule is not None
        levels = schedule.make(request.schedule, self._training, request.steps)
        if len(levels) != request.steps:
            warnings.append(
                f"schedule {levels.name!r} runs {len(levels)} steps, not {request.steps}"
            )
        table = solvers.make(request.sampler, levels, self.facts.prediction, request.eta)
        return table.guided(request.guidance)

    def _latent_shape(self, request: Request, warnings: list[str]) -> tuple[int, int, int]:
        """(C, h, w): the size asked for, rounded up to what the network takes."""
        assert request.height is not None
        assert request.width is not None
        facts = self.facts.latent
        multiple = facts.factor * facts.multiple
        height, width = images.padded_size(request.height, request.width, multiple)
        if (height, width) != (request.height, request.width):
            warnings.append(
                f"{request.width}x{request.height} is no multiple of {multiple}: made at"
                f" {width}x{height} and cropped at the centre"
            )
        return facts.channels, height // facts.factor, width // facts.factor

    def _finish(self, sessions: Metered, request: Request, index: int, latent: Array) -> Picture:
        assert request.height is not None
        assert request.width is not None
        decoded = latents.decode(sessions, latent, self.facts.latent.scale)
        pixels = images.crop_centre(images.to_uint8(decoded), request.height, request.width)
        own = replace(request, seed=request.seed_of(index), count=1, batch_size=1)
        return Picture(Image.fromarray(pixels), own, latent, self.about)


def _request(request: Request | None, fields: dict[str, Any]) -> Request:
    if request is None:
        return Request.from_dict(fields)
    if fields:
        raise RequestError(
            f"both a Request and {', '.join(fields)}",
            hint="give one Request, or keyword arguments alone",
        )
    return request


def _repeat(text: Floats | None, count: int) -> Any:
    return None if text is None else np.repeat(text, count, axis=0)


def _running(timings: Timings) -> AbstractContextManager[None]:
    return stage(timings, "total")
