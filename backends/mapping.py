"""A file in memory, of which only what is being read stays there.

An engine that reads a compiled network, or compiles one, packs its weights anew and has no use for
the file's bytes afterwards; but pages once read stay in the process's resident memory, another copy
of the network in every figure of it. The kernel keeps such pages in its own cache, so giving them
back costs next to nothing if they should be read again.

checked by  tests/unit/test_mapping.py
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO

import numpy as np

from ..engine.ports import Array

LISTED = Path("/proc/self/maps")
EVERY_S = 0.05  # at 2 GB/s of reading, 0.1 GB lie about in between


class Mapped:
    """The bytes of a file; `data` is uint8 [n] over them, and lives as long as this does.

    `data` calls itself writable, as openvino.Tensor demands. It is not: a write ends the process.
    OpenVINO maps the files of its own cache in the same way.
    """

    def __init__(self, file: Path | IO[bytes]) -> None:
        """file: by name, or open; it may be closed afterwards, and lose its name."""
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        seen = np.frombuffer(self._map, np.uint8)
        raw = (ctypes.c_uint8 * len(seen)).from_address(seen.ctypes.data)
        self.data: Array = np.ctypeslib.as_array(raw)

    def release(self) -> None:
        """Give the pages back that were read; they come again when they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def passing(self) -> Iterator[Array]:
        """`data`, for a block that reads it once: pages are given back all the time."""
        with _again_and_again(self.release):
            yield self.data


@dataclass(frozen=True)
class Pages:
    """Where a library has mapped files by itself: (address, bytes) of each.

    Who gives them back holds what keeps them mapped: an address that was let go may be somebody
    else's memory by now.
    """

    ranges: frozenset[tuple[int, int]]

    def __sub__(self, others: Pages) -> Pages:
        return Pages(self.ranges - others.ranges)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """As `Mapped.passing`, for a block that reads the files once."""
        if not self.ranges:
            yield
            return
        kernel = ctypes.CDLL(None)

        def release() -> None:
            for address, length in self.ranges:
                place = ctypes.c_void_p(address), ctypes.c_size_t(length)
                kernel.madvise(*place, mmap.MADV_DONTNEED)

        with _again_and_again(release):
            yield


def pages_of(file: Path) -> Pages:
    """The mappings of a file in this process that nobody can write to; none where the kernel does
    not list them."""
    try:
        lines = LISTED.read_text("utf-8", "surrogateescape").split("\n")
    except OSError:
        return Pages(frozenset())
    name, found = str(file.resolve()), set()
    for line in lines:
        where, rights, *_, mapped = line.split(maxsplit=5) or ("", "", "")
        if mapped == name and rights.startswith("r--"):
            low, high = (int(n, 16) for n in where.split("-"))
            found.add((low, high - low))
    return Pages(frozenset(found))


@contextmanager
def _again_and_again(release: Callable[[], None]) -> Iterator[None]:
    done = Event()

    def sweep() -> None:
        while not done.wait(EVERY_S):
            release()

    sweeper = Thread(target=sweep, name="sdengine-release", daemon=True)
    sweeper.start()
    try:
        yield
    finally:
        done.set()
        sweeper.join()
        release()
