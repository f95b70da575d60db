"""A file of requests becomes a folder of pictures, and goes on where it was stopped.

A picture is written whole, under a name that its content decides, before `results.jsonl` says so.
So whatever ends the process, at any moment, a later start finds out what is there: it makes what is
missing and says in the log what is there and not said yet.

checked by  tests/serve/test_batch.py, test_batch_killed.py, test_batch_storage.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from ..engine import images
from ..engine.errors import RequestError, SdengineError
from ..engine.finish import Picture
from ..engine.metadata import read_metadata
from ..engine.pipeline import Pipeline
from ..engine.request import Progress
from .durable import Folder, Log
from .plan import Item, Job, jobs

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Made:
    """A picture as a file's bytes. `seconds` since the one before it, on its own worker."""

    item: Item
    data: bytes
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """Pictures that could not be made, and why."""

    items: tuple[Item, ...]
    error: SdengineError


Report = Callable[[float], None]  # called with the pictures done since the start, in parts of one


class Engine(Protocol):
    """Whatever makes pictures: a pipeline here, or many elsewhere."""

    @property
    def most(self) -> int | None:
        """Pictures of one job; None: as many as its line holds."""

    def run(self, work: Sequence[Job], report: Report) -> Iterator[Made | Failed]:
        """Every picture of every job, once, in any order. Errors of a job are given, not raised."""


@dataclass
class Outcome:
    """What a batch came to. `failed` are pictures; `bad` are lines that never ran."""

    wanted: int
    already: int = 0
    made: int = 0
    failed: int = 0
    bad: int = 0
    seconds: float = 0.0
    paths: list[Path] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.failed == 0 and self.bad == 0


@dataclass(frozen=True)
class Hooks:
    """What a caller wants to hear of: a new file; a failure; how far it is of how much."""

    on_file: Callable[[Path], None] = lambda _: None
    on_failure: Callable[[Failed], None] = lambda _: None
    on_progress: Callable[[float, int], None] = lambda *_: None


def run(
    wanted: Sequence[Item],
    out: Path,
    engine: Engine,
    *,
    keep_going: bool = False,
    together: int = 1,
    hooks: Hooks = Hooks(),
) -> Outcome:
    """Make in the folder `out` what is not there yet.

    keep_going  a picture that cannot be made does not stop the others
    together    pictures of one network call, of lines that differ in words and seeds alone
    raises      StorageError; RequestError where another batch fills the folder; any SdengineError
                of a job, unless `keep_going`
    """
    outcome, begin = Outcome(len(wanted)), perf_counter()
    with Folder(out) as folder, Log(out / RESULTS) as log:
        there = {item.name for item in wanted if (out / item.name).is_file()}
        outcome.already = len(there)
        _say_what_is_there(wanted, there, out, log)
        work = jobs(wanted, there, engine.most, together)
        total = len(wanted) - len(there)
        hooks.on_progress(0.0, total)
        for found in engine.run(work, lambda done: hooks.on_progress(done, total)) if work else ():
            if isinstance(found, Failed):
                if not keep_going:
                    raise found.error
                outcome.failed += len(found.items)
                log.append(_failure(found))
                hooks.on_failure(found)
                continue
            path = folder.write(found.item.name, found.data)
            log.append(_success(found))
            outcome.made += 1
            hooks.on_file(path)
    outcome.seconds = perf_counter() - begin
    outcome.paths = [out / item.name for item in wanted if (out / item.name).is_file()]
    return outcome


def _say_what_is_there(wanted: Sequence[Item], there: set[str], out: Path, log: Log) -> None:
    """A crash between a picture and its line leaves a picture that no line tells of."""
    said = {row.get("picture") for row in log.rows}
    for item in wanted:
        if item.name in there and item.name not in said:
            read_metadata(out / item.name)  # raises for what is no picture
            log.append({**_about(item), "recovered": True})


def _about(item: Item) -> dict[str, Any]:
    return {
        "line": item.line,
        "picture": item.name,
        "prompt": item.request.prompt,
        "seed": item.request.seed,
    }


def _success(made: Made) -> dict[str, Any]:
    row = {**_about(made.item), "seconds": round(made.seconds, 4), "bytes": len(made.data)}
    return {**row, "warnings": list(made.warnings)} if made.warnings else row


def _failure(failed: Failed) -> dict[str, Any]:
    return {
        "line": failed.items[0].line,
        "failed": [item.name for item in failed.items],
        "error": type(failed.error).__name__,
        "message": failed.error.message,
        "hint": failed.error.hint,
    }


class Local:
    """One pipeline in this process. `load` opens it, and is given a preset's name or None."""

    most: int | None = None

    def __init__(self, load: Callable[[str | None], AbstractContextManager[Pipeline]]) -> None:
        self._load = load

    def run(self, work: Sequence[Job], report: Report) -> Iterator[Made | Failed]:
        """Jobs of one preset together: a preset decides the precision that is loaded."""
        done = 0
        for preset in dict.fromkeys(job.request.preset for job in work):
            with self._load(preset) as pipe:
                for job in (one for one in work if one.request.preset == preset):

                    def on_step(at: Progress, before: int = done) -> None:
                        report(before + at.picture + at.step / at.steps)

                    yield from pictures(pipe, job, on_step)
                    done += len(job.items)
        report(done)


def pictures(
    pipe: Pipeline,
    job: Job,
    on_step: Callable[[Progress], None] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Made | Failed]:
    """The pictures of one job, each as soon as it is there, encoded. After a failure those that
    are left are made one by one: else each start would stop at the same one, the rest untried.

    given       the pictures that it is made from, where their paths say nothing here
    """
    if job.together:
        yield from _together(pipe, job, on_step)
        return
    last, done = perf_counter(), 0
    sources: dict[str, Any] = dict(job.items[0].pictures if given is None else given)
    try:
        for result in pipe.stream(job.request, on_step=on_step, **sources):
            for picture in result.pictures[done:]:
                data = _encoded(job.items[done], picture)
                now = perf_counter()
                yield Made(job.items[done], data, now - last, tuple(result.warnings))
                last, done = now, done + 1
    except SdengineError as error:
        if len(job.items) == 1:
            yield Failed(job.items, error)
            return
        for one in job.apart()[done:]:
            yield from pictures(pipe, one, on_step, given)


def _together(
    pipe: Pipeline, job: Job, on_step: Callable[[Progress], None] | None
) -> Iterator[Made | Failed]:
    """Where one of them cannot be made, each on its own: so that the others are."""
    begin = perf_counter()
    try:
        results = pipe.together(job.requests, on_step=on_step)
    except SdengineError:
        for one in job.apart():
            yield from pictures(pipe, one, on_step)
        return
    each = (perf_counter() - begin) / len(results)
    for item, result in zip(job.items, results, strict=True):
        yield Made(item, _encoded(item, result.pictures[0]), each, tuple(result.warnings))


def _encoded(item: Item, picture: Picture) -> bytes:
    return images.encode(picture.image, Path(item.name), picture.text())


def check_suffix(name: str) -> str:
    """`png` -> `.png`. Raises RequestError for what is no format of pictures."""
    suffix = f".{name.lower().removeprefix('.')}"
    if suffix not in images.FORMATS:
        raise RequestError(
            f"--format {name} is not a known picture format",
            hint=f"take one of: {', '.join(known[1:] for known in images.FORMATS)}",
        )
    return suffix
