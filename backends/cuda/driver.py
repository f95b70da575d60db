"""The real device: NVIDIA's driver through cuda.bindings, and the kernels of row.cu as PTX.

The PTX is of CUDA 12.0 for compute capability 7.5: the driver compiles it for the GPU at hand.
bench/make_row_ptx.py makes it from row.cu.

checked by  tests/unit/test_cuda_driver.py (without a GPU: what the library says, call by call)
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.errors import BackendError, BackendUnavailable
from ...engine.ports import Array
from .device import MIB, Facts, Kernel

BLOCK = 256  # threads
LEAST_DRIVER = (12, 0)
MEND = "pip install 'cuda-python>=12.8'"
DRIVER = (
    "install NVIDIA's driver on the host (`nvidia-smi` must work), and start a container with"
    " --gpus all"
)
_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


def library() -> Any:
    """cuda.bindings.driver, initialised. Raises BackendUnavailable: no package, no driver."""
    try:
        from cuda.bindings import driver  # type: ignore
    except ImportError as error:
        raise BackendUnavailable(f"cuda-python is not installed: {error}", hint=MEND) from error
    try:
        status = driver.cuInit(0)[0]
    except Exception as error:  # cuda.bindings has no public class for a missing libcuda
        said = str(error).partition(". ")[0]
        raise BackendUnavailable(f"there is no NVIDIA driver: {said}", hint=DRIVER) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailable(f"NVIDIA's driver finds no GPU: {_name(status)}", hint=DRIVER)
    return driver


def count(cuda: Any) -> int:
    status, number = cuda.cuDeviceGetCount()
    return int(number) if status == cuda.CUresult.CUDA_SUCCESS else 0


_CURRENT = threading.local()  # whose GPU each thread works with now


class Driver:
    """`device.Device` on GPU number `index`, counted after CUDA_VISIBLE_DEVICES.

    raises  BackendUnavailable: no driver, one that is too old, no such GPU
    """

    def __init__(self, index: int = 0, cuda: Any = None) -> None:
        self._cuda = library() if cuda is None else cuda
        self.index = index
        version = int(self._call("cuDriverGetVersion"))
        self._version = (version // 1000, version % 1000 // 10)
        if self._version < LEAST_DRIVER:
            found, least = (".".join(map(str, v)) for v in (self._version, LEAST_DRIVER))
            raise BackendUnavailable(
                f"the NVIDIA driver is too old: it speaks CUDA {found}, expected {least} or newer",
                hint="update the driver on the host to release 525 or newer; `nvidia-smi` says"
                " which it is",
            )
        if index >= (found_gpus := count(self._cuda)):
            raise BackendUnavailable(
                f"there is no cuda:{index}: {found_gpus} GPUs are visible",
                hint="`nvidia-smi -L` lists them; CUDA_VISIBLE_DEVICES may hide some",
            )
        self._device = self._call("cuDeviceGet", index)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._kernels: dict[Kernel, Any] = {}

    def facts(self) -> Facts:
        self.enter()
        attribute = self._cuda.CUdevice_attribute
        major, minor = (
            int(self._call("cuDeviceGetAttribute", a, self._device))
            for a in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = bytes(self._call("cuDeviceGetName", 256, self._device)).split(b"\0")[0].decode()
        free, total = self._call("cuMemGetInfo")
        return Facts(self.index, name, (major, minor), self._version, int(total), int(free))

    def enter(self) -> None:
        """What this thread does next is this GPU's; engines of a library count too."""
        if getattr(_CURRENT, "driver", None) is not self:
            self._call("cuCtxSetCurrent", self._context)
            _CURRENT.driver = self

    def allocate(self, size: int) -> int:
        self.enter()
        status, address = self._cuda.cuMemAlloc(size)
        if _name(status) == _MEMORY:
            free, total = self._call("cuMemGetInfo")
            raise BackendError(
                f"cuda:{self.index} has no room for {-(-size // MIB)} MiB:"
                f" {int(free) // MIB} of {int(total) // MIB} MiB are free",
                hint="ask for a smaller size or batch, or end what else runs there (`nvidia-smi`)",
            )
        self._check("cuMemAlloc", status)
        return int(address)

    def release(self, address: int) -> None:
        self.enter()
        self._cuda.cuMemFree(address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        self.enter()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self._call("cuMemAllocHost", max(size, 1)))
        memory = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, self._cuda.cuMemFreeHost, address)
        return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)

    def stream(self) -> int:
        self.enter()
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", flags))

    def end(self, stream: int) -> None:
        self.enter()
        self._cuda.cuStreamDestroy(stream)

    def write(self, address: int, values: Array, stream: int) -> None:
        self.enter()
        self._call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, stream)

    def read(self, values: Array, address: int, stream: int) -> None:
        self.enter()
        self._call("cuMemcpyDtoHAsync", values.ctypes.data, address, values.nbytes, stream)

    def copy(self, to: int, of: int, size: int, stream: int) -> None:
        self.enter()
        self._call("cuMemcpyDtoDAsync", to, of, size, stream)

    def launch(self, kernel: Kernel, threads: int, run: int, call: int, stream: int) -> None:
        self.enter()
        if not self._kernels:
            self._load()
        blocks = -(-threads // BLOCK)
        arguments = ((run, call), (ctypes.c_void_p, ctypes.c_void_p))
        self._call(
            "cuLaunchKernel", self._kernels[kernel], blocks, 1, 1, BLOCK, 1, 1, 0, stream,
            arguments, 0,
        )  # fmt: skip

    def wait(self, stream: int) -> None:
        self.enter()
        self._call("cuStreamSynchronize", stream)

    def mark(self, stream: int) -> int:
        self.enter()
        event = self._call("cuEventCreate", self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._call("cuEventRecord", event, stream)
        return int(event)

    def wait_mark(self, event: int) -> None:
        self.enter()
        self._call("cuEventSynchronize", event)
        self._call("cuEventDestroy", event)

    @contextmanager
    def capturing(self, stream: int) -> Iterator[Callable[[], int]]:
        """Where the block fails, the capture is ended, and nothing is kept."""
        self.enter()
        made: list[int] = []
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            yield lambda: made[0]
        except BaseException:
            self._cuda.cuStreamEndCapture(stream)
            raise
        graph = self._call("cuStreamEndCapture", stream)
        made.append(int(self._call("cuGraphInstantiate", graph, 0)))
        self._call("cuGraphDestroy", graph)

    def replay(self, graph: int, stream: int) -> None:
        self.enter()
        self._call("cuGraphLaunch", graph, stream)

    def drop(self, graph: int) -> None:
        self.enter()
        self._cuda.cuGraphExecDestroy(graph)

    def _load(self) -> None:
        """The kernels, compiled by the driver for this GPU."""
        ptx = Path(__file__).with_name("row.ptx").read_bytes()
        module = self._call("cuModuleLoadData", ptx + b"\0")
        names: tuple[Kernel, ...] = ("feed", "advance", "next_row")
        find = "cuModuleGetFunction"
        self._kernels = {name: self._call(find, module, name.encode()) for name in names}

    def _call(self, function: str, *arguments: Any) -> Any:
        """What it gives beside its status. Raises BackendError, with the driver's word."""
        status, *rest = getattr(self._cuda, function)(*arguments)
        self._check(function, status)
        return rest[0] if len(rest) == 1 else tuple(rest)

    def _check(self, function: str, status: Any) -> None:
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise BackendError(
                f"cuda:{self.index}: {function} failed with {_name(status)}",
                hint="after such an error a GPU is of no use to this process: start it again;"
                " `sdengine doctor` lists other backends",
            )


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
