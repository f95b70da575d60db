"""The worker: a process with the engine in it, which does one run after the other.

`python -m sdengine.serve.worker`, frames of wire.py on stdin and stdout. It is told

    begin   models, engine, memory                    once, first
    warm    model                                     open it and run one step
    run     run, model, requests, images, mask, depth and the pictures as blobs
    stop    run                                       end it at its next step

and says `ready`, `warmed`, `step` (with a rough picture of each), `made` (one picture), `done` and
`failed`. It ends when stdin does.

checked by  tests/http/test_worker.py
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO

from ..engine.errors import RequestError, SdengineError
from . import wire
from .masked import PutBack, masked, unchanged
from .wire import Message

if TYPE_CHECKING:
    from ..engine.pipeline import OnStep, Pipeline, Result
    from ..engine.request import Progress, Request, Timings

NICE = 5  # the server must win a processor from its engines: it needs little, and at once
PAYS = 0.9  # of a picture's time alone: what it must take in a batch for batches to be made
TRIED = 4  # pictures in the batch that is tried at the start


class Stopped(Exception):
    """The run was told to end."""


class Worker:
    def __init__(self, out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._stopped = -1  # the run that was told to end last; runs count up

    def say(self, kind: str, /, blobs: list[bytes] | None = None, **fields: Any) -> None:
        frame = wire.pack(kind, fields, () if blobs is None else blobs)
        with self._lock:
            self._out.write(frame)
            self._out.flush()

    def listen(self, stream: BinaryIO) -> None:
        """In a thread of its own: a `stop` must be seen while a run goes on."""
        try:
            while (message := wire.read(stream)) is not None:
                if message.kind == "stop":
                    self._stopped = message.fields["run"]
                else:
                    self._inbox.put(message)
        finally:  # the server has gone, within a frame perhaps; nobody wants what is being made
            os._exit(0)

    def serve(self) -> None:
        begin = self._inbox.get()
        self._open(begin.fields)
        self.say("ready", pid=os.getpid())
        answers = {"warm": self._warm, "run": self._run}
        while True:
            message = self._inbox.get()
            self._careful(message, answers[message.kind])

    def _open(self, fields: Mapping[str, Any]) -> None:
        from .. import api
        from .shelf import Shelf

        paths = {name: Path(path) for name, path in fields["models"].items()}
        how = {name: value for name, value in fields["engine"].items() if value is not None}
        self.shelf: Shelf[Pipeline] = Shelf(
            paths, lambda path: api.load(path, **how), fields["memory"]
        )

    def _careful(self, message: Message, answer: Any) -> None:
        run = message.fields.get("run")
        try:
            answer(message)
        except Stopped:
            self.say("stopped", run=run, rss=self._rss())
        except SdengineError as error:
            self.say("failed", run=run, error=type(error).__name__, message=error.message,
                     hint=error.hint, rss=self._rss())  # fmt: skip
        except Exception as error:  # ours to mend: the process lives, and says what it was
            traceback.print_exc()
            self.say("failed", run=run, error="SdengineError", rss=self._rss(),
                     message=f"unexpected {type(error).__name__}: {error}"[:500],
                     hint="report this; the server's log shows where it happened")  # fmt: skip

    def _rss(self) -> int:
        from .shelf import resident

        return resident()

    def _warm(self, message: Message) -> None:
        """What a first request would wait for is done now: libraries, networks, shapes."""
        pipe = self.shelf.get(message.fields["model"])
        pays, seconds = False, None
        if pipe.facts.variant == "base":
            pipe(prompt="warm-up", steps=1)
            seconds = _timed(pipe, 1)
            if message.fields["measure"]:
                _timed(pipe, TRIED)  # its shape is compiled
                pays = _timed(pipe, TRIED) < PAYS * seconds
        self.say("warmed", batch_pays=pays, about=pipe.about, rss=self._rss())

    def _run(self, message: Message) -> None:
        from ..engine.request import Request

        run, fields = message.fields["run"], message.fields
        pipe = self.shelf.get(fields["model"])
        requests = [Request.from_dict(values) for values in fields["requests"]]
        given = pictures(fields, message.blobs)
        put_back: PutBack = unchanged
        if fields["fill"] != "none" or fields["region"] is not None:
            requests[0], given, put_back = masked(requests[0], given, fields)

        def on_step(at: Progress) -> None:
            if run == self._stopped:
                raise Stopped
            factor = pipe.facts.latent.factor
            rough = [] if at.guess is None else [at.guess(k) for k in range(len(requests))]
            small = [pixels[::factor, ::factor] for pixels in rough]
            shapes = [list(pixels.shape[:2]) for pixels in small]
            self.say("step", [pixels.tobytes() for pixels in small], run=run, step=at.step,
                     steps=at.steps, rough=shapes, factor=factor)  # fmt: skip

        if run == self._stopped:
            raise Stopped
        start = perf_counter()
        timings: list[Timings] = []
        warnings: list[str] = []
        for slot, answer in enumerate(_answers(pipe, requests, given, on_step)):
            if isinstance(answer, RequestError):
                self.say("refused", run=run, slot=slot, message=answer.message, hint=answer.hint)
                continue
            if not any(answer.timings is seen for seen in timings):
                timings.append(answer.timings)
            warnings.extend(answer.warnings)
            for picture in answer.pictures:
                image, about = put_back(picture.image, picture.about)
                self.say("made", [image.tobytes()], run=run, slot=slot, width=image.width,
                         height=image.height, request=picture.request.to_dict(),
                         about=about)  # fmt: skip
        self.say("done", run=run, seconds=perf_counter() - start, timings=_summed(timings),
                 warnings=warnings, rss=self._rss(), models=self.shelf.names,
                 crowded=self.shelf.crowded)  # fmt: skip


def _answers(
    pipe: Pipeline, requests: list[Request], given: dict[str, Any], on_step: OnStep
) -> Iterator[Result | RequestError]:
    """One for each request: in one batch, or, where they turn out not to fit together, singly."""
    if len(requests) > 1:
        try:
            yield from pipe.together(requests, on_step=on_step)
            return
        except RequestError:
            pass
    for request in requests:
        try:
            yield pipe(request, on_step=on_step, **given)
        except RequestError as error:
            yield error


def _summed(timings: list[Timings]) -> dict[str, float]:
    """Seconds of each stage."""
    each = [{k: v for k, v in vars(one).items() if k != "rows"} for one in timings]
    return {stage: sum(one[stage] for one in each) for stage in (each[0] if each else ())}


def _timed(pipe: Pipeline, count: int) -> float:
    """Seconds a picture."""
    start = perf_counter()
    pipe(prompt="warm-up", steps=2, count=count, batch_size=count)
    return (perf_counter() - start) / count


def pictures(fields: Mapping[str, Any], blobs: tuple[bytes, ...]) -> dict[str, Any]:
    """The keyword arguments of a pipeline: bytes, or arrays made of them; never a path."""
    rest = iter(blobs)
    images = [next(rest) for _ in range(fields["images"])]
    given: dict[str, Any] = {"image": images} if images else {}
    if fields["mask"] is not None:
        mask = next(rest)
        given["mask"] = clear(mask) if fields["mask"] == "clear" else mask
    if fields["depth"]:
        given["depth"] = next(rest)
    return given


def clear(encoded: bytes) -> Any:
    """uint8 [h, w]: white where the picture is transparent. Raises RequestError."""
    import numpy as np

    from ..engine.sources import opacity, read

    return 255 - np.asarray(opacity(read(encoded)), np.uint8)


def main() -> None:
    if hasattr(os, "nice"):  # not on Windows
        os.nice(NICE)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the frames
    # The server decides when it ends, by closing the pipe: these reach the whole group at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    worker = Worker(out)
    threading.Thread(target=worker.listen, args=(sys.stdin.buffer,), daemon=True).start()
    worker.serve()


if __name__ == "__main__":
    main()
