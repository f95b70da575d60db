"""Engines of TensorRT, either flavour, on a device's memory: opened, fed by address, enqueued.

checked by  tests/unit/test_backend_trt.py
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...engine.errors import ArtifactMismatch, BackendError, BackendUnavailable
from ...engine.ports import Array, Handle
from ...engine.spec import ComponentSpec, Graph
from .device import Buffer, Device, Lane

log = logging.getLogger("sdengine.backends")


class Lanes:
    """One lane for each thread: sessions of several threads run side by side, from one set of
    weights. They are closed with the last network that uses them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._own = threading.local()
        self._all: list[Lane] = []
        self._users: set[int] = set()

    def enter(self, user: object) -> None:
        self._users.add(id(user))

    def leave(self, user: object) -> None:
        """May be said again."""
        self._users.discard(id(user))
        if not self._users:
            self.close()

    def mine(self) -> Lane:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None or lane not in self._all:
            lane = self._own.lane = Lane(self.device)
            self._all.append(lane)
        return lane

    def close(self) -> None:
        for lane in self._all:
            lane.close()
        self._all.clear()


class Messages:
    """What the library complained of. It raises nothing: it says no, and logs why."""

    def __init__(self) -> None:
        self._said: list[str] = []

    def logger(self, library: Any) -> Any:
        """An ILogger that hands errors to us, and the rest to logging."""
        levels = {
            library.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
            library.ILogger.Severity.ERROR: logging.ERROR,
            library.ILogger.Severity.WARNING: logging.INFO,
        }

        def note(own: Any, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                self._said.append(message.strip())
            log.log(min(level, logging.INFO), "%s: %s", library.__name__, message)

        def begin(own: Any) -> None:
            library.ILogger.__init__(own)

        return type("Log", (library.ILogger,), {"log": note, "__init__": begin})()

    def take(self) -> str:
        said, self._said = self._said, []
        return said[0] if said else "it does not say why"  # the first is the cause


def deserialize(runtime: Any, messages: Messages, plan: bytes, whose: str, hint: str) -> Any:
    """An engine.

    raises  ArtifactMismatch: of another GPU or version, or no engine at all; BackendUnavailable:
            the library is newer than the driver
    """
    messages.take()
    try:
        engine = runtime.deserialize_cuda_engine(plan)
    except Exception as error:
        raise ArtifactMismatch(f"the engine of {whose} cannot be opened: {error}", hint=hint) from (
            error
        )
    if engine is not None:
        return engine
    said = messages.take()
    if "driver version is insufficient" in said:
        raise BackendUnavailable(
            f"the NVIDIA driver is too old for this library, or missing: {said}",
            hint="update the driver on the host (`nvidia-smi` says which it is), or install a"
            " release of the library for its CUDA",
        )
    raise ArtifactMismatch(
        f"the engine of {whose} ({len(plan)} bytes) cannot be opened here: {said}", hint=hint
    )


def refit(library: Any, messages: Messages, engine: Any, graph: Graph, whose: str) -> None:
    """Give an engine that was built without weights those of its graph's file, for all contexts.

    raises      ArtifactMismatch: the file lacks a weight of the engine, or has another one
    source      TensorRT developer guide, refitting an engine; Python API, OnnxParserRefitter
    """
    messages.take()
    logger = messages.logger(library)
    refitter = library.Refitter(engine, logger)
    parser = library.OnnxParserRefitter(refitter, logger)
    read = parser.refit_from_file(str(graph.path))
    said = [str(parser.get_error(i)).strip() for i in range(parser.num_errors)]
    missing = list(refitter.get_missing_weights())
    if read and not missing and refitter.refit_cuda_engine():
        return
    lacks = f"no values for {', '.join(missing[:3])}" if missing else ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    why = "; ".join(part for part in (lacks + more, *said) if part)
    raise ArtifactMismatch(
        f"the engine of {whose} was built without weights and cannot be given those of"
        f" {graph.path.name}: {why if why else messages.take()}",
        hint="build whole engines: leave SDENGINE_TRT=strip out; `sdengine inspect BUNDLE --verify`"
        " tells whether the bundle is whole",
    )


class DeviceArray(Handle):
    """float32 on the device. Slices share the memory."""

    def __init__(
        self, lane: Lane, buffer: Buffer, shape: tuple[int, ...], dtype: Any, offset: int = 0
    ) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._lane, self._buffer, self._offset = lane, buffer, offset

    @property
    def address(self) -> int:
        return self._buffer.address + self._offset

    def __getitem__(self, rows: slice) -> DeviceArray:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, "neighbouring rows alone"
        row = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        shape = (max(0, stop - start), *self.shape[1:])
        return DeviceArray(self._lane, self._buffer, shape, self.dtype, self._offset + start * row)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        fetched = self._lane.to_host(self.address, self.shape, self.dtype)
        return fetched if dtype is None else fetched.astype(dtype)


class Opened:
    """An engine: one set of weights on the device, for all contexts."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine


class EngineRun:
    """One execution context: a network with some inputs held on the device.

    opened      shared with other runs: the weights are there once
    kept        outputs that stay on the device, as handles
    """

    def __init__(
        self,
        library: Any,
        opened: Opened,
        messages: Messages,
        graph: Graph,
        whose: str,
        lanes: Lanes,
        held: Mapping[str, Array],
        kept: frozenset[str],
    ) -> None:
        self.spec = ComponentSpec(
            whose, tuple(t for t in graph.inputs if t.name not in held), graph.outputs
        )
        self._dtypes = {t.name: np.dtype(t.dtype) for t in (*graph.inputs, *graph.outputs)}
        self.lanes = lanes
        self._opened, self._messages, self._kept = opened, messages, kept
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        lanes.device.enter()
        self._context = opened.engine.create_execution_context(strategy)
        if self._context is None:
            raise BackendError(
                f"no execution context for {whose}: {messages.take()}",
                hint="free memory of the GPU: `nvidia-smi` shows who holds it",
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, Buffer] = {}
        self._staged: dict[str, Array] = {}
        self._scratch = (0, 0)
        self._handles: dict[str, Handle] = {}
        for name, value in held.items():
            self._shape(name, value.shape)
            if isinstance(value, DeviceArray):
                self._handles[name] = value
                self.point(name, value.address)
            else:
                self._buffers[name] = lanes.mine().to_device(value)
                self.point(name, self._buffers[name].address)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        lane = self.lanes.mine()
        self.place({name: value.shape for name, value in feeds.items()})
        for name, value in feeds.items():
            self._give(lane, name, value)
        self.enqueue(lane)
        results: dict[str, Any] = {}
        for tensor in self.spec.outputs:
            shape, buffer = self._shapes[tensor.name], self._buffers[tensor.name]
            if tensor.name in self._kept:
                own = Buffer(lane.device, buffer.size)
                lane.device.copy(own.address, buffer.address, buffer.size, lane.stream)
                results[tensor.name] = DeviceArray(lane, own, shape, tensor.dtype)
            else:
                staged = self._staging(lane, tensor.name, shape)
                lane.device.read(staged, buffer.address, lane.stream)
                results[tensor.name] = staged
        lane.device.wait(lane.stream)
        for name, value in results.items():
            if isinstance(value, np.ndarray):
                results[name] = value.copy()
        return results

    def place(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        changed = {n: s for n, s in shapes.items() if self._shapes.get(n) != s}
        if not changed:
            return
        for name, shape in changed.items():
            self._shape(name, shape)
        fresh = list(changed)
        for tensor in self.spec.outputs:
            self._shapes[tensor.name] = tuple(self._context.get_tensor_shape(tensor.name))
            fresh.append(tensor.name)
        for name in fresh:
            size = self._dtypes[name].itemsize * int(np.prod(self._shapes[name]))
            if name not in self._buffers or self._buffers[name].size != size:
                self._buffers[name] = Buffer(self.lanes.device, size)
            self.point(name, self._buffers[name].address)

    def address(self, name: str) -> int:
        return self._buffers[name].address

    def point(self, name: str, address: int) -> None:
        self._agreed(self._context.set_tensor_address(name, address), f"the address of {name}")

    def enqueue(self, lane: Lane) -> None:
        lane.device.enter()
        scratch = lane.scratch(int(self._opened.engine.device_memory_size_v2))
        if scratch != self._scratch:
            self._context.set_device_memory(*scratch)
            self._scratch = scratch
        self._agreed(self._context.execute_async_v3(lane.stream), "the call")

    def capturable(self, lane: Lane) -> bool:
        asked = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX alone has it
        return True if asked is None else bool(asked(lane.stream))

    def _give(self, lane: Lane, name: str, value: Array) -> None:
        if isinstance(value, DeviceArray):
            self._handles[name] = value  # it must outlive the call
            self.point(name, value.address)
            return
        if self._handles.pop(name, None) is not None:
            self.point(name, self._buffers[name].address)
        staged = self._staging(lane, name, value.shape)
        np.copyto(staged, value)
        lane.device.write(self._buffers[name].address, staged, lane.stream)

    def _staging(self, lane: Lane, name: str, shape: tuple[int, ...]) -> Array:
        staged = self._staged.get(name)
        if staged is None or staged.shape != shape:
            staged = self._staged[name] = lane.device.pinned(shape, self._dtypes[name])
        return staged

    def _shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._agreed(self._context.set_input_shape(name, shape), f"{name} of shape {list(shape)}")
        self._shapes[name] = tuple(shape)

    def _agreed(self, agreed: bool, what: str) -> None:
        if not agreed:
            raise BackendError(
                f"the engine of {self.spec.name} refuses {what}: {self._messages.take()}",
                hint="`sdengine inspect` shows the sizes of engines in the bundle; another backend "
                "(`sdengine doctor` lists them) runs any size",
            )
