"""From a request to pictures: encode, start, denoise, decode. The sessions are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from PIL import Image

from . import footprint, memory, presets, safety, tasks, textplan
from .batch import Batch, check_alike, stacked
from .bundle import STATISTICS, Bundle
from .clock import Metered, stage
from .errors import RequestError
from .finish import Finisher, Picture
from .footprint import Loading
from .given import Given
from .loop import denoise
from .noise import VariedNoise, noise_stream
from .ports import Array, Floats, Sessions, State, Step
from .request import Progress, Request, Timings
from .setup import Setting, set_up
from .state import Saved
from .tasks import Streams, Task
from .tasks.work import Statistics
from .texts import Texts
from .weights import read_tensors

OnStep = Callable[[Progress], None]
OnState = Callable[[Saved], None]


@dataclass
class Result:
    """What a run gives. `request` is the one that ran, with nothing left open.

    cost        of one picture, in calls of the full UNet with both halves
    """

    request: Request
    pictures: list[Picture] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    warnings: list[str] = field(default_factory=list)
    cost: float = 0.0

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.pictures[0].image

    @property
    def images(self) -> list[Image.Image]:
        return [p.image for p in self.pictures]


@dataclass(frozen=True)
class _Control:
    on_step: OnStep | None
    on_state: OnState | None
    stop_after: int | None
    resume: Saved | None


class Pipeline:
    """A bundle and its sessions, ready for requests. A context manager; close() frees the engines.

    about       backend, precision and the like, written into every picture
    available   bytes of memory that a run may take; None: not known, nothing is tiled
    loading     how the sessions load; None: not known, a run is not held against `available`
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Sessions,
        about: dict[str, str],
        available: int | None = None,
        loading: Loading | None = None,
    ) -> None:
        self.bundle, self.facts = bundle, bundle.facts
        self.about = {"model": bundle.facts.name, "bundle": bundle.id,
                      "model_sha256": bundle.facts.source.sha256, **about}  # fmt: skip
        self._sessions = sessions
        self._texts = Texts(bundle)
        self._available, self._loading = available, loading
        self._unet = bundle.component("unet")
        classifier = bundle.components.get(safety.COMPONENT)
        self._classifier = None if classifier is None else classifier.config
        self._statistics = _statistics(bundle)

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
        self,
        request: Request | None = None,
        /,
        *,
        on_step: OnStep | None = None,
        on_state: OnState | None = None,
        stop_after: int | None = None,
        resume: Saved | None = None,
        **fields: Any,
    ) -> Iterator[Result]:
        """As a call, but yields the same, growing Result after each batch of pictures.

        on_state    called after each network call with what is needed to go on from there
        stop_after  network calls, after which the first batch is left unfinished
        resume      go on from there; the request must be the one that was saved with it
        """
        given = Given.take(fields)
        asked = _request(request, fields)
        task = tasks.choose(self.facts, asked.task, given)
        native = None if task.placed else self.facts.native_size
        result = Result(asked.completed(task.name, native))
        control = _Control(on_step, on_state, stop_after, resume)
        return self._batches(task, given, result, control)

    def _batches(
        self, task: Task, given: Given, result: Result, control: _Control
    ) -> Iterator[Result]:
        timings = result.timings
        sessions = Metered(self._sessions, timings)
        with _running(timings):
            with stage(timings, "prepare"):
                setting = set_up(task, self.bundle, result.request, given, self._available)
                self._check_memory(setting, min(result.request.batch_size, result.request.count))
            request, table = setting.request, setting.table
            work = setting.work(sessions, self._statistics)
            result.request = request
            result.warnings.extend(setting.warnings)
            result.cost = presets.cost(table, presets.costs_of(self._unet))
            with stage(timings, "text"):
                guided = bool((table.guidance != 1.0).any())
                plans = self._texts.plans(request, guided, result.warnings)
                size = min(request.batch_size, request.count)
                row = 0 if control.resume is None else control.resume.state.rows
                texts = self._encode(sessions, setting, plans, size, min(row, len(table) - 1))
            with stage(timings, "prepare"):
                begin = task.prepare(work)
            sources = given.about()
            about = {**self.about, **sources, "cost": f"{result.cost:.4g}"}
            finish = Finisher(work, about, self._classifier, result.warnings)
            if request.safety != "off" and self._classifier is not None:
                work.open(safety.COMPONENT, {"B": 1})  # what cannot run must fail before the steps
        for first in range(0, request.count, request.batch_size):
            with _running(timings):
                count = min(request.batch_size, request.count - first)
                streams = [self._streams(request, first + k) for k in range(count)]
                with stage(timings, "prepare"):
                    begun = [begin(own) for own in streams]
                batch = Batch(
                    self.bundle.id, work, first, streams, begun, texts, sources, setting.plan
                )
                start = batch.start(sessions, control.resume)
                x, done = (start.x, start.rows) if isinstance(start, State) else (start, 0)
                step: Step | None = None
                with stage(timings, "denoise"):
                    before, last = len(timings.rows), perf_counter()
                    since = last
                    steps, ahead = _steps(sessions, batch, start, control.on_state is not None)
                    for step in steps:
                        done, now = step.row.index + 1, perf_counter()
                        timings.rows.append(now - last)
                        if control.on_state is not None:
                            control.on_state(batch.saved(step))
                        if control.on_step is not None:
                            control.on_step(batch.progress(step, now - last))
                        if done == control.stop_after:
                            break
                        last = perf_counter()
                    if step is not None:
                        x = step.x  # the only one that is read, unless somebody watches
                    if ahead:
                        _even(timings.rows, before, since)
                if done == len(table):
                    with stage(timings, "decode"):
                        for k, latent in enumerate(x):
                            result.pictures.append(finish(first + k, latent))
            yield result
            if control.stop_after is not None or control.resume is not None:
                return

    def together(
        self, requests: Sequence[Request], *, on_step: OnStep | None = None
    ) -> list[Result]:
        """One picture of each request, all in the same network calls; the same Timings in each.

        requests    of a model that needs no picture, equal but for prompts and seeds, count 1
        raises      RequestError when they differ in more, or would run more than one picture;
                    else as a call
        """
        check_alike(requests)
        task = tasks.choose(self.facts, requests[0].task, Given())
        timings = Timings()
        sessions = Metered(self._sessions, timings)
        with _running(timings):
            with stage(timings, "prepare"):
                whole = [r.completed(task.name, self.facts.native_size) for r in requests]
                size = len(whole)
                shared = replace(whole[0], batch_size=size)
                setting = set_up(task, self.bundle, shared, Given(), self._available)
                self._check_memory(setting, size)
                own = [
                    replace(one, height=setting.request.height, width=setting.request.width)
                    for one in whole
                ]
                work = setting.work(sessions, self._statistics)
            results = [Result(one, timings=timings, warnings=list(setting.warnings)) for one in own]
            with stage(timings, "text"):
                guided = bool((setting.table.guidance != 1.0).any())
                plans = [self._texts.plans(r.request, guided, r.warnings) for r in results]
                texts = stacked([self._encode(sessions, setting, p, size, 0) for p in plans])
            with stage(timings, "prepare"):
                begin = task.prepare(work)
                streams = [self._streams(one, 0) for one in own]
                begun = [begin(each) for each in streams]
            batch = Batch(self.bundle.id, work, 0, streams, begun, texts, {}, setting.plan)
            start = batch.start(sessions, None)
            assert not isinstance(start, State), "nothing was resumed"
            with stage(timings, "denoise"):
                since = last = perf_counter()
                steps, ahead = _steps(sessions, batch, start)
                for step in steps:
                    now = perf_counter()
                    timings.rows.append(now - last)
                    if on_step is not None:
                        on_step(batch.progress(step, now - last))
                    last = perf_counter()
                x = step.x
                if ahead:
                    _even(timings.rows, 0, since)
            cost = presets.cost(setting.table, presets.costs_of(self._unet))
            about = {**self.about, "cost": f"{cost:.4g}"}
            with stage(timings, "decode"):
                for result, latent in zip(results, x, strict=True):
                    result.cost = cost
                    finish = Finisher(
                        replace(work, request=result.request),
                        about, self._classifier, result.warnings,
                    )  # fmt: skip
                    result.pictures.append(finish(0, latent))
        return results

    def _streams(self, request: Request, index: int) -> Streams:
        """Of picture `index`. The reference's own scripts draw from two generators."""
        assert request.noise is not None
        asked = request.own(index)
        seed, other = asked.seed, asked.variation_seed
        assert seed is not None
        own = start = noise_stream(request.noise, seed)
        if other is not None:
            start = VariedNoise(own, noise_stream(request.noise, other), request.variation_strength)
        apart = request.compat == "reference" and request.noise == "numpy"
        return Streams(start, noise_stream("torch", seed) if apart else own)

    def _check_memory(self, setting: Setting, size: int) -> None:
        """Raises NotEnoughMemory. A batch is one network call."""
        if self._loading is None or not memory.known(self.bundle):
            return
        _, h, w = setting.canvas.latent(self.facts.latent)
        together = setting.request.halves == "together"
        asked = footprint.need(
            self.bundle, self._loading, setting.table, (h, w), setting.plan,
            batch=size, together=together,
        )  # fmt: skip
        footprint.check(self.bundle, asked, self._loading, self._available)

    def _encode(
        self, sessions: Metered, setting: Setting, plans: list[textplan.Plan], size: int, row: int
    ) -> tuple[Floats | None, Floats]:
        """The text of a run; meanwhile the UNet is loaded that its first row will ask for.

        size    pictures in a network call
        row     the first that will run
        """
        first, request = setting.table.rows()[row], setting.request
        if setting.plan.unet_tile is None:
            _, h, w = setting.canvas.latent(self.facts.latent)
            both = first.guidance != 1.0 and request.halves == "together"
            tokens = len(plans[0]) * self.facts.tokenizer.length
            dims = {"B": 2 * size if both else size, "T": tokens, "h": h, "w": w}
            sessions.expect("unet", dims, first.graph, paired=both)
        return self._texts.encode(sessions, plans)


def _statistics(bundle: Bundle) -> Statistics:
    """Mean and deviation of the image embeddings, where the bundle has them."""
    conditioning = bundle.facts.image_conditioning
    if conditioning is None or not conditioning.statistics:
        return None, None
    found = read_tensors(bundle.component("image_encoder").weights, STATISTICS)
    mean, std = (found[name] for name in STATISTICS)
    return mean, std


def _request(request: Request | None, fields: dict[str, Any]) -> Request:
    if request is None:
        return Request.from_dict(fields)
    if fields:
        raise RequestError(
            f"both a Request and {', '.join(fields)}",
            hint="give one Request, or keyword arguments alone",
        )
    return request


def _steps(
    sessions: Metered, batch: Batch, start: Array | State, saved: bool = False
) -> tuple[Iterator[Step], bool]:
    """The run's steps, and whether the host runs ahead of a device that makes them.

    saved       after each row: there is nothing to gain then from a device that runs alone
    """
    if sessions.denoiser is not None and not saved:
        job = batch.job(start)
        steps = None if job is None else sessions.denoiser(job)
        if steps is not None:
            return steps, True
    return denoise(batch.work.table, batch.predict, start, batch.noise, batch.settle), False


def _even(rows: list[float], before: int, since: float) -> None:
    """Where the host only enqueues, its times say nothing about one row: all of a batch get the
    mean."""
    count = len(rows) - before
    rows[before:] = [(perf_counter() - since) / count] * count if count else []


def _running(timings: Timings) -> AbstractContextManager[None]:
    return stage(timings, "total")
