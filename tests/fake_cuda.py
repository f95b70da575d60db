"""A GPU of host memory, for tests: it runs nothing before somebody waits for it.

The kernels are those of backends/cuda/row.cu, compiled for the processor. Everything that is
enqueued is kept as a piece of work and noted in `calls`; `wait` does it, in order. So whatever
reads a result too early reads the poison that fresh memory holds.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sdengine.backends.cuda.device import Facts
from sdengine.engine.errors import BackendError

ROW_CU = Path(__file__).parents[1] / "backends" / "cuda" / "row.cu"
SHIM = r"""
#define __global__
struct Place { long long x; };
static thread_local Place blockIdx, blockDim, threadIdx;
#include "%s"
#define HOST(name) \
    extern "C" void host_##name(const Run *run, const Call *call, long long threads) { \
        blockDim.x = 256; \
        for (long long i = 0; i < (threads + 255) / 256 * 256; i++) { \
            blockIdx.x = i / 256; threadIdx.x = i %% 256; name(run, call); } }
HOST(feed) HOST(advance) HOST(next_row)
"""


@functools.cache
def kernels(folder: Path):
    """row.cu for this processor, without fused multiply-adds, as the PTX has it."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        message = "no C++ compiler: the kernels cannot be run on this processor"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    source, made = folder / "row_host.cpp", folder / "librow.so"
    source.write_text(SHIM % ROW_CU)
    options = ["-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-ffp-contract=off", "-x", "c++"]
    subprocess.run([compiler, *options, str(source), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    for name in ("feed", "advance", "next_row"):
        getattr(library, f"host_{name}").argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_longlong]
    return library


class FakeDevice:
    """calls    what was enqueued or waited for, in order: ("launch", "feed"), ("wait",), ...
    memory      address -> host bytes
    """

    def __init__(self, folder: Path, facts: Facts | None = None, room: int = 1 << 34) -> None:
        self._rows = kernels(folder)
        self._facts = facts or Facts(0, "Fake GPU", (8, 9), (12, 4), 24 << 30, 20 << 30)
        self.room = room
        self.calls: list[tuple] = []
        self.memory: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list] = {}
        self.events: dict[int, bool] = {}
        self._work: list = []
        self._capture: list | None = None
        self._number = 100

    def facts(self) -> Facts:
        return self._facts

    def enter(self) -> None:
        pass

    def allocate(self, size: int) -> int:
        if sum(m.nbytes for m in self.memory.values()) + size > self.room:
            raise BackendError(f"no room for {size} bytes", hint="a smaller size")
        assert self._capture is None, "memory is allocated while a graph is captured"
        block = np.full(size + 256, 0xFF, np.uint8)  # as float32: NaN
        address = -(-block.ctypes.data // 256) * 256
        self.memory[address] = block
        return address

    def release(self, address: int) -> None:
        self.drain()  # as cuMemFree does
        del self.memory[address]

    def pinned(self, shape, dtype) -> np.ndarray:
        return np.full(shape, 123, dtype)

    def stream(self) -> int:
        self._number += 1
        self.streams.add(self._number)
        return self._number

    def end(self, stream: int) -> None:
        self.streams.remove(stream)

    def enqueue(self, what: tuple, work) -> None:
        """A piece of work, from this file or from a fake engine."""
        if self._capture is not None:
            self._capture.append((what, work))
            return
        self.calls.append(what)
        self._work.append(work)

    def write(self, address: int, values: np.ndarray, stream: int) -> None:
        assert self._capture is None, "host memory is not captured"
        self.enqueue(
            ("write", values.nbytes),
            lambda: ctypes.memmove(address, values.ctypes.data, values.nbytes),
        )

    def read(self, values: np.ndarray, address: int, stream: int) -> None:
        assert self._capture is None, "host memory is not captured"
        self.enqueue(
            ("read", values.nbytes),
            lambda: ctypes.memmove(values.ctypes.data, address, values.nbytes),
        )

    def copy(self, to: int, of: int, size: int, stream: int) -> None:
        self.enqueue(("copy", size), lambda: ctypes.memmove(to, of, size))

    def launch(self, kernel, threads: int, run: int, call: int, stream: int) -> None:
        assert stream in self.streams
        function = getattr(self._rows, f"host_{kernel}")
        self.enqueue(("launch", kernel), lambda: function(run, call, threads))

    def wait(self, stream: int) -> None:
        assert self._capture is None, "waiting breaks a capture"
        self.calls.append(("wait",))
        self.drain()

    def drain(self) -> None:
        work, self._work = self._work, []
        for piece in work:
            piece()

    def mark(self, stream: int) -> int:
        self._number += 1
        event = self._number
        self.events[event] = False
        self._work.append(lambda: self.events.__setitem__(event, True))
        return event

    def wait_mark(self, event: int) -> None:
        self.calls.append(("wait_mark", self.events[event]))
        self.drain()
        del self.events[event]

    @contextmanager
    def capturing(self, stream: int):
        self._capture, made = [], []
        try:
            yield lambda: made[0]
            self._number += 1
            self.graphs[self._number] = self._capture
            made.append(self._number)
        finally:
            self._capture = None

    def replay(self, graph: int, stream: int) -> None:
        pieces = list(self.graphs[graph])
        self.enqueue(("replay", len(pieces)), lambda: [work() for _, work in pieces])

    def drop(self, graph: int) -> None:
        del self.graphs[graph]


def view(address: int, shape, dtype=np.float32) -> np.ndarray:
    """Device memory as an array; only for work that runs."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)
