"""ONNX Runtime on an NVIDIA GPU: its CUDA and its TensorRT execution provider.

Inputs, outputs and what is held lie in our own device memory and are bound by address (I/O
binding), on our stream, so that nothing is copied that stays there and `denoiser` runs a whole
table as it does with TensorRT. Networks whose inputs stay where they are run as CUDA graphs.

checked by  tests/unit/test_backend_onnxruntime_cuda.py (recorded options and calls, without a GPU)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import metadata
from typing import Any, ClassVar

import numpy as np

from ..engine.errors import BackendUnavailable
from ..engine.paths import cache_dir
from ..engine.ports import Array, Job, Probe, Step
from ..engine.spec import Component, Graph, Precision, Profile, TensorSpec, named_dims
from . import plans
from .base import GraphBackend, Run, agree, first_line, kept_by
from .cuda.board import TableBoard
from .cuda.device import Device, Lane, device_index
from .cuda.engines import EngineRun, Lanes, Messages, Opened
from .denoise import denoise

log = logging.getLogger("sdengine.backends")

WHEELS = ("onnxruntime", "onnxruntime-gpu")
MEND = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.22'"
ERRORS_ONLY = 3
NOT_CAPTURED = "-1"


def open_device(index: int) -> Device:
    from .cuda.driver import Driver

    return Driver(index)


class OneLane(Lanes):
    """A session of ONNX Runtime is made for one stream: all threads take turns on it."""

    def mine(self) -> Lane:
        if not self._all:
            self._all.append(Lane(self.device))
        return self._all[0]


class OnnxRuntimeCuda(GraphBackend):
    """device, library  others than NVIDIA's driver and the package in tests"""

    name = "onnxruntime-cuda"
    provider: ClassVar[str] = "CUDAExecutionProvider"

    def __init__(self, device: Callable[[int], Device] = open_device, library: Any = None) -> None:
        self._open_device, self._given = device, library
        self._lanes: dict[int, OneLane] = {}

    def probe(self) -> Probe:
        return self._probe

    def probe_on(self, device: str) -> Probe:
        """Of the library and its first GPU; whether that one is there is seen when it is opened."""
        try:
            device_index(device)
        except BackendUnavailable as error:
            return Probe(False, error.message, error.hint)
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        installed = [name for name in WHEELS if _installed(name)]
        if len(installed) > 1:
            return Probe(
                False, f"{' and '.join(installed)} are both installed and overwrite each other's"
                " files: what runs may be the processor's, without a word", MEND,
            )  # fmt: skip
        try:
            library = self._library
        except ModuleNotFoundError:
            return Probe(False, "the package onnxruntime-gpu is not installed", MEND)
        except Exception as error:
            return Probe(False, f"onnxruntime cannot be imported: {first_line(error)}", MEND)
        providers = library.get_available_providers()
        if self.provider not in providers:
            has = ", ".join(p.removesuffix("ExecutionProvider") for p in providers)
            return Probe(False, f"this build of onnxruntime has {has}; not {self._kind}", MEND)
        try:
            facts = self._lane_of(0).device.facts()
        except BackendUnavailable as error:
            return Probe(False, error.message, error.hint)
        reason = f"ONNX Runtime {library.__version__}, {self._kind}, on {facts.name} (sm{facts.sm})"
        precisions: tuple[Precision, ...] = ("f16", "bf16", "f32", "int8")
        return Probe(True, reason, precisions=precisions, speed=35)

    @property
    def _kind(self) -> str:
        return self.provider.removesuffix("ExecutionProvider")

    @cached_property
    def _library(self) -> Any:
        if self._given is not None:
            return self._given
        import onnxruntime  # type: ignore[import-untyped]

        onnxruntime.disable_telemetry_events()
        preload = getattr(onnxruntime, "preload_dlls", None)
        if preload is not None:
            preload()  # CUDA and cuDNN where NVIDIA's wheels, or torch, have put them
        return onnxruntime

    def _lane_of(self, index: int) -> OneLane:
        if index not in self._lanes:
            self._lanes[index] = OneLane(self._open_device(index))
        return self._lanes[index]

    def _network(self, component: Component, profile: Profile) -> Component:
        """Strongly typed graphs where there are some; int8 has Q/DQ of its own."""
        if profile.precision == "f32":
            return component
        if profile.precision == "int8" and "int8" not in component.typed:
            return component.at("int8")
        return plans.typed(component, profile.precision)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> OnnxCudaGraph:
        index = device_index(profile.device)
        lanes, library = self._lane_of(index), self._library
        options = library.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        for dim, size in profile.dims.items():
            options.add_free_dimension_override_by_name(dim, size)
        fixed = not [d for d in named_dims(graph.inputs) if d not in profile.dims]
        fed = any(t.name.startswith("features") for t in graph.inputs)
        session, captured = self._session(graph, options, lanes, index, fixed and not fed)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        agree(component, graph, {t.name for t in inputs}, {t.name for t in outputs})
        engine = OnnxEngine(library, session, graph, index, captured)
        return OnnxCudaGraph(engine, component, graph, lanes)

    def _session(
        self, graph: Graph, options: Any, lanes: OneLane, index: int, captured: bool
    ) -> tuple[Any, bool]:
        """A session, captured where the network lets itself be.

        raises  BackendUnavailable: ONNX Runtime fell back to the processor
        """
        library, stream = self._library, str(lanes.mine().stream)
        lanes.device.enter()
        try:
            session = library.InferenceSession(
                str(graph.path), options, providers=self.providers(index, stream, captured)
            )
        except Exception as error:
            if not captured:
                raise
            log.info("%s is not captured: %s", graph.path.name, first_line(error))
            return self._session(graph, options, lanes, index, False)
        if session.get_providers()[0] != self.provider:
            raise BackendUnavailable(
                f"ONNX Runtime left {self._kind} out: it runs {graph.path.name} on"
                f" {', '.join(session.get_providers())}",
                hint="its CUDA or cuDNN libraries were not found: pip install"
                " 'onnxruntime-gpu[cuda,cudnn]'; `sdengine doctor` names the versions",
            )
        return session, captured

    def providers(self, index: int, stream: str, captured: bool) -> list[Any]:
        """Options by provider, in order of preference."""
        cuda = {
            "device_id": str(index),
            "user_compute_stream": stream,
            "cudnn_conv_algo_search": "EXHAUSTIVE",  # shapes are few and come again
            "prefer_nhwc": "1",
            "use_tf32": "0",  # f32 means float32
            "enable_cuda_graph": str(int(captured)),
        }
        return [("CUDAExecutionProvider", cuda)]

    def denoiser(self, job: Job) -> Iterator[Step] | None:
        """The whole table on the device: ports.Denoiser."""
        found = {key: getattr(session, "runner", None) for key, session in job.sessions.items()}
        runners = {key: r for key, r in found.items() if isinstance(r, EngineRun)}
        if not runners or len(runners) < len(found):
            return None
        lane = next(iter(runners.values())).lanes.mine()
        return denoise(job, TableBoard(lane, job, runners, graphs=False))


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """Engines are built in the first call, and kept below the cache's folder."""

    name = "onnxruntime-trt"
    provider = "TensorrtExecutionProvider"

    def providers(self, index: int, stream: str, captured: bool) -> list[Any]:
        folder = str(cache_dir() / "onnxruntime-trt")
        trt = {
            "device_id": str(index),
            "user_compute_stream": stream,
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
            "trt_cuda_graph_enable": str(int(captured)),
        }
        return [("TensorrtExecutionProvider", trt), *super().providers(index, stream, False)]


class OnnxCudaGraph:
    """One graph of one network; each run of it has a binding of its own."""

    def __init__(
        self, engine: OnnxEngine, component: Component, graph: Graph, lanes: OneLane
    ) -> None:
        self._opened: Opened | None = Opened(engine)
        self._graph, self._lanes = graph, lanes
        self._whose = f"{component.spec.name}/{graph.name}"
        self._kept = kept_by(component, graph)
        lanes.enter(self)

    def open(self, held: Mapping[str, Array]) -> Run:
        assert self._opened is not None, "a closed network opens nothing"
        return EngineRun(
            _NoStrategy, self._opened, Messages(), self._graph, self._whose, self._lanes, held,
            self._kept,
        )  # fmt: skip

    def close(self) -> None:
        self._opened = None
        self._lanes.leave(self)


class _NoStrategy:
    """In the place of the module that names strategies of memory: ours is given by address."""

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = None


class OnnxEngine:
    """A session, with what backends/cuda/engines.py asks of an engine."""

    device_memory_size_v2 = 0  # it has an arena of its own

    def __init__(
        self, library: Any, session: Any, graph: Graph, index: int, captured: bool
    ) -> None:
        self.library, self.session, self.graph, self.index = library, session, graph, index
        self.captured, self.contexts = captured, 0
        self.lock = threading.Lock()

    def create_execution_context(self, strategy: object) -> OnnxContext:
        self.contexts += 1
        return OnnxContext(self, self.contexts)


class OnnxContext:
    """A binding, with the calls of a TensorRT context."""

    def __init__(self, engine: OnnxEngine, number: int) -> None:
        self._engine = engine
        self._binding = engine.session.io_binding()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._at: dict[str, int] = {}
        self._bound = False
        self._options = engine.library.RunOptions()
        # our stream is waited for by us, where results are read
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        graph_id = str(number) if engine.captured else NOT_CAPTURED
        self._options.add_run_config_entry("gpu_graph_id", graph_id)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name], self._bound = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output; sizes that no input has are found by running once."""
        graph = self._engine.graph
        (tensor,) = [t for t in graph.outputs if t.name == name]
        sizes = {
            dim: size
            for t in graph.inputs
            for dim, size in zip(t.shape, self._shapes[t.name], strict=True)
            if isinstance(dim, str)
        }
        if set(named_dims([tensor])) <= sizes.keys():
            self._shapes[name] = tensor.resolve(sizes)
        else:
            zeros = {t.name: np.zeros(self._shapes[t.name], t.dtype) for t in graph.inputs}
            (found,) = self._engine.session.run([name], zeros, _unbound(self._engine))
            self._shapes[name] = found.shape
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name], self._bound = address, False
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        pass

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        with engine.lock:
            if not self._bound:
                self._bind(engine.graph.inputs, self._binding.bind_input)
                self._bind(engine.graph.outputs, self._binding.bind_output)
                self._bound = True
            engine.session.run_with_iobinding(self._binding, self._options)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return False  # it captures by itself

    def _bind(self, tensors: tuple[TensorSpec, ...], bind: Callable[..., None]) -> None:
        index = self._engine.index
        for t in tensors:
            bind(t.name, "cuda", index, t.dtype, self._shapes[t.name], self._at[t.name])


def _unbound(engine: OnnxEngine) -> Any:
    options = engine.library.RunOptions()
    options.add_run_config_entry("gpu_graph_id", NOT_CAPTURED)
    return options


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
