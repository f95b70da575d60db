"""From a request to pictures: encode, start, denoise, decode. The sessions are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from . import safety, tasks
from .bundle import Bundle
from .clock import Metered, stage
from .errors import RequestError
from .finish import Finisher, Picture
from .given import Given
from .guidance import Conditions, Guidance
from .loop import Settle, denoise
from .noise import noise_stream
from .ports import Array, Floats, Sessions
from .request import Progress, Request, Timings
from .setup import set_up
from .table import Row
from .tasks import Beginning, Streams, Task, Work, inpaint
from .tasks.work import Statistics
from .tokenizer import Tokenizer

OnStep = Callable[[Progress], None]


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

    def __init__(
        self,
        bundle: Bundle,
        sessions: Sessions,
        about: dict[str, str],
    ) -> None:
        self.bundle, self.facts = bundle, bundle.facts
        self.about = {"model": bundle.facts.name, "bundle": bundle.id,
                      "model_sha256": bundle.facts.source.sha256, **about}  # fmt: skip
        self._sessions = sessions
        self._tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
        classifier = bundle.components.get(safety.COMPONENT)
        self._classifier = None if classifier is None else classifier.config
        self._statistics: Statistics = (None, None)

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

        image, mask, depth  the pictures given, beside the request: `image` may be a list
        on_step     called after each network call
        raises      RequestError, BackendError, NumericsError
        """
        *_, result = self.stream(request, on_step=on_step, **fields)
        return result

    def stream(
        self, request: Request | None = None, /, *, on_step: OnStep | None = None, **fields: Any
    ) -> Iterator[Result]:
        """As a call, but yields the same, growing Result after each batch of pictures."""
        given = Given.take(fields)
        asked = _request(request, fields)
        task = tasks.choose(self.facts, asked.task, given)
        native = None if task.placed else self.facts.native_size
        result = Result(asked.completed(task.name, native))
        return self._batches(task, given, result, on_step)

    def _batches(
        self, task: Task, given: Given, result: Result, on_step: OnStep | None
    ) -> Iterator[Result]:
        timings = result.timings
        sessions = Metered(self._sessions, timings)
        with _running(timings):
            with stage(timings, "prepare"):
                setting = set_up(task, self.facts, result.request, given)
            request, table, work = (
                setting.request,
                setting.table,
                setting.work(sessions, self._statistics),
            )
            result.request = request
            result.warnings.extend(setting.warnings)
            with stage(timings, "text"):
                uncond, cond = self._encode(sessions, request, result.warnings)
            with stage(timings, "prepare"):
                begin = task.prepare(work)
            about = {**self.about, **given.about()}
            finish = Finisher(work, about, self._classifier, result.warnings)
        for first in range(0, request.count, request.batch_size):
            with _running(timings):
                count = min(request.batch_size, request.count - first)
                streams = [self._streams(request, first + k) for k in range(count)]
                with stage(timings, "prepare"):
                    begun = [begin(own) for own in streams]
                texts = _repeat(uncond, count), _repeat(cond, count)
                predict = Guidance(sessions, *texts, _conditions(begun))
                x = np.stack([b.x for b in begun])
                settle = _settle(work, begun)

                def noise(streams: list[Streams] = streams) -> Array:
                    return np.stack([own.other.normal(work.shape) for own in streams])

                with stage(timings, "denoise"):
                    last = perf_counter()
                    for step in denoise(table, predict, x, noise, settle):
                        x, now = step.x, perf_counter()
                        timings.rows.append(now - last)
                        if on_step is not None:
                            place = (first, request.count, step.row.index + 1, len(table))
                            on_step(Progress(*place, seconds=now - last))
                        last = perf_counter()
                with stage(timings, "decode"):
                    for k, latent in enumerate(x):
                        result.pictures.append(finish(first + k, latent))
            yield result

    def _streams(self, request: Request, index: int) -> Streams:
        """Of picture `index`. The reference's own scripts draw from two generators."""
        assert request.noise is not None
        seed = request.seed_of(index)
        start = noise_stream(request.noise, seed)
        apart = request.compat == "reference" and request.noise == "numpy"
        return Streams(start, noise_stream("torch", seed) if apart else start)

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


def _conditions(begun: Sequence[Beginning]) -> Conditions:
    """Those of the pictures of a batch, together. All of a run have the same kinds of them."""

    def together(name: str) -> Array | None:
        each = [getattr(b, name) for b in begun]
        return None if each[0] is None else np.stack(each)

    return Conditions(together("channels"), together("label"), together("unlabelled"))


def _settle(work: Work, begun: Sequence[Beginning]) -> Settle | None:
    """Puts back, after each row and at its level of noise, what is not to be repainted.

    After the last row it is put back clean: a schedule may end a little above no noise at all, but
    the decoder knows nothing of levels.
    """
    kept = [b.kept for b in begun if b.kept is not None]
    if not kept:
        return None
    latent, noise = (np.stack(each) for each in zip(*kept, strict=True))
    mask = inpaint.mask_of(work)
    alphas = np.append(work.table.alphas[1:-1], 1.0).astype(np.float32)
    sigmas = np.append(work.table.sigmas[1:-1], 0.0).astype(np.float32)

    def settle(x: Array, row: Row) -> Array:
        still = alphas[row.index] * latent + sigmas[row.index] * noise
        settled: Array = mask * x + (1 - mask) * still
        return settled

    return settle
