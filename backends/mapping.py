"""A file in memory, of which only what is being read stays there.

An engine that reads a compiled network packs its weights anew and has no use for the file's bytes
afterwards; but pages once read stay in the process's resident memory, another copy of the network
in every figure of it. The kernel keeps such pages in its own cache, so giving them back costs next
to nothing if they should be read again.

checked by  tests/unit/test_mapping.py
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import IO

import numpy as np

from ..engine.ports import Array

EVERY_S = 0.02  # at 2 GB/s of reading, 0.04 GB lie about in between


class Mapped:
    """The bytes of a file; `data` is uint8 [n] over them, which calls itself writable."""

    def __init__(self, file: Path | IO[bytes]) -> None:
        """file: by name, or open; it may be closed afterwards, and lose its name."""
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = writable(np.frombuffer(self._map, np.uint8))

    def release(self) -> None:
        """Give the pages back that were read; they come again when they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def passing(self) -> Iterator[Array]:
        """`data`, for a block that reads it once: pages are given back all the time."""
        done = Event()

        def sweep() -> None:
            while not done.wait(EVERY_S):
                self.release()

        sweeper = Thread(target=sweep, name="sdengine-release", daemon=True)
        sweeper.start()
        try:
            yield self.data
        finally:
            done.set()
            sweeper.join()
            self.release()


def writable(values: Array) -> Array:
    """The same memory, calling itself writable, as OpenVINO demands of what it is to share. Where
    it is not a write ends the process; OpenVINO maps files of its own in the same way."""
    return np.asarray(_Writable(values))


class _Writable:
    """What numpy takes for an array, and holds as long as the array lives."""

    def __init__(self, values: Array) -> None:
        self._values = values
        place = values.__array_interface__
        self.__array_interface__ = {**place, "data": (place["data"][0], False)}
