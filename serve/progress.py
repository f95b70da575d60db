"""How far a batch is, and when it will be done: a bar on a terminal, elsewhere a line now and then.

checked by  tests/serve/test_batch_command.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TextIO

Tick = Callable[[float, int], None]  # pictures done (in parts of one), of how many

EVERY_S = 10.0  # seconds between two lines where there is no terminal


@contextmanager
def progress(quiet: bool, stream: TextIO | None = None) -> Iterator[Tick]:
    """A Tick. `stream` is stderr, unless it is given."""
    place = sys.stderr if stream is None else stream
    if quiet:
        yield lambda done, total: None
    elif place.isatty():
        with _bar(place) as tick:
            yield tick
    else:
        yield Lines(place)


class Lines:
    """`12 of 100 pictures, 0.41 s each, 0:36 left`, at most every EVERY_S seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = perf_counter) -> None:
        self._stream, self._clock = stream, clock
        self._begin: float | None = None
        self._last, self._ended = -EVERY_S, False

    def __call__(self, done: float, total: int) -> None:
        now = self._clock()
        if self._begin is None:
            self._begin = now
        ended = done >= total
        if self._ended or (now - self._last < EVERY_S and not ended):
            return
        self._last, self._ended, passed = now, ended, now - self._begin
        text = f"{int(done)} of {total} pictures"
        if done >= 1:
            left = passed / done * (total - done)
            text += f", {passed / done:.2f} s each, {clock_text(left)} left"
        self._stream.write(f"{text}\n")
        self._stream.flush()


def clock_text(seconds: float) -> str:
    """3725 -> `1:02:05`, 36 -> `0:36`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _bar(stream: TextIO) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as bars:
        bar = bars.add_task("", total=None)

        def tick(done: float, total: int) -> None:
            bars.update(bar, description=f"{int(done)} of {total}", completed=done, total=total)

        yield tick
