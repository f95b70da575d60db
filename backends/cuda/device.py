"""A GPU as the backends see it: memory, one stream for each lane of work, three kernels.

`driver.Driver` is the real one; tests bring one of host memory that runs nothing before it is
waited for. Addresses are whole numbers; nothing here knows a network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ...engine.errors import BackendUnavailable
from ...engine.ports import Array

Kernel = Literal["feed", "advance", "next_row"]
MIB = 2**20


@dataclass(frozen=True)
class Facts:
    """What a device is. `driver` is the newest CUDA that its driver speaks, (12, 4).

    memory, free    bytes
    """

    index: int
    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]
    memory: int
    free: int

    @property
    def sm(self) -> int:
        """90 for 9.0."""
        return 10 * self.capability[0] + self.capability[1]


class Device(Protocol):
    """One GPU. Everything that takes a stream is enqueued there and returns at once; host memory
    that it reads or writes is of `pinned`, and stays as it is until the stream was waited for."""

    def facts(self) -> Facts: ...
    def enter(self) -> None:
        """Before a library that works on its own is called in a thread."""
        ...

    def allocate(self, size: int) -> int:
        """Bytes of device memory, aligned to 256. Raises BackendError: with the numbers."""
        ...

    def release(self, address: int) -> None: ...
    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Page-locked host memory, freed with its last view."""
        ...

    def stream(self) -> int: ...
    def end(self, stream: int) -> None: ...
    def write(self, address: int, values: Array, stream: int) -> None: ...
    def read(self, values: Array, address: int, stream: int) -> None: ...
    def copy(self, to: int, of: int, size: int, stream: int) -> None: ...
    def launch(self, kernel: Kernel, threads: int, run: int, call: int, stream: int) -> None: ...
    def wait(self, stream: int) -> None:
        """Until all that was enqueued is done. Raises BackendError: something of it failed."""
        ...

    def mark(self, stream: int) -> int:
        """An event behind what was enqueued so far."""
        ...

    def wait_mark(self, event: int) -> None:
        """Until the event has passed; it is gone then."""
        ...

    def capturing(self, stream: int) -> AbstractContextManager[Callable[[], int]]:
        """Record what is enqueued in the block instead of running it; what it gives says, behind
        the block, the graph's handle."""
        ...

    def replay(self, graph: int, stream: int) -> None: ...
    def drop(self, graph: int) -> None: ...


class Buffer:
    """Device memory that is freed when nobody has it any more, or by `free`."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = device.allocate(max(size, 1))
        self._end = weakref.finalize(self, device.release, self.address)

    def free(self) -> None:
        self._end()


class Lane:
    """One stream of work, and the scratch memory that all engines on it take in turn.

    Work of one lane runs in order, so that one arena, as large as the neediest engine, serves all
    of them; what is to run side by side takes lanes of its own.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = device.stream()
        self._scratch: Buffer | None = None
        self._end = weakref.finalize(self, device.end, self.stream)

    @property
    def arena(self) -> int:
        """Where the scratch memory lies now; 0 before any engine asked for it."""
        return 0 if self._scratch is None else self._scratch.address

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of an arena of at least `size` bytes.

        The lane is waited for before an arena that is too small goes: what runs may be using it.
        """
        if self._scratch is None or self._scratch.size < size:
            if self._scratch is not None:
                self.device.wait(self.stream)
                self._scratch.free()
                self._scratch = None
            self._scratch = Buffer(self.device, size)
        return self._scratch.address, self._scratch.size

    def to_device(self, values: Array) -> Buffer:
        """A copy on the device; done when this returns."""
        buffer = Buffer(self.device, values.nbytes)
        staged = self.device.pinned(values.shape, values.dtype)
        np.copyto(staged, values)
        self.device.write(buffer.address, staged, self.stream)
        self.device.wait(self.stream)
        return buffer

    def to_host(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        """What lies there, after all that was enqueued: an array of its own."""
        staged = self.device.pinned(shape, dtype)
        self.device.read(staged, address, self.stream)
        self.device.wait(self.stream)
        return staged.copy()

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None
        self._end()


def device_index(name: str | None) -> int:
    """`cuda:1` is 1; `cuda`, and None, are 0. Raises BackendUnavailable."""
    device = "cuda" if name is None else name.lower()
    if device == "cuda":
        return 0
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise BackendUnavailable(
            f"device {device!r} is no GPU that CUDA knows",
            hint="give cuda, cuda:0, cuda:1, ...; CUDA_VISIBLE_DEVICES chooses which are counted",
        )
    return int(number)
