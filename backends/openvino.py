"""OpenVINO on the processor: the embedded default engine.

Graphs are compiled for the Profile's shapes, and the compiled form is kept in the machine's cache:
the next start maps it into memory, which takes a third of the time and half of the memory.

checked by  tests/contract/test_backends.py, tests/unit/test_backend_openvino.py
"""

from __future__ import annotations

import io
import logging
import mmap
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Precision, Profile
from . import machine
from .base import GraphBackend, Run, agree, first_line
from .cache import Key, Store, open_store

log = logging.getLogger("sdengine.backends")

DEVICE = "CPU"
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def library() -> Any:
    """The openvino module, without its telemetry.

    `import openvino` starts a thread that sends an event to a web service. Its own code takes a
    missing `openvino_telemetry` to mean "send nothing"; we make it missing in this process. One
    that somebody imported before us is left alone.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # type: ignore[import-untyped]

    return openvino


class OpenVINO(GraphBackend):
    name = "openvino"

    def __init__(self, store: Store | None = None) -> None:
        self._store = store

    def probe(self) -> Probe:
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        mend = "pip install 'openvino>=2026.2'"
        try:
            openvino = library()
        except ModuleNotFoundError:
            return Probe(False, "the package openvino is not installed", mend)
        except Exception as error:
            return Probe(False, f"openvino cannot be imported: {first_line(error)}", mend)
        try:
            abilities = self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        except Exception as error:
            return Probe(False, f"openvino finds no processor to run on: {first_line(error)}")
        precisions: tuple[Precision, ...] = ("bf16", "f32") if "BF16" in abilities else ("f32",)
        # Without such instructions int8 layers are computed all the same, but no faster.
        fast = INT8_FLAGS & set(machine.processor().split())
        precisions = ("int8", *precisions) if fast else (*precisions, "int8")
        reason = f"OpenVINO {_version(openvino)} on CPU, {machine.threads()} threads"
        return Probe(True, reason, precisions=precisions, speed=30)

    @cached_property
    def _core(self) -> Any:
        return library().Core()

    def _hint(self, precision: Precision) -> Precision:
        """What layers compute in that are not int8: of an int8 network, the fastest there is."""
        floats = [p for p in self._probe.precisions if p != "int8"]
        return floats[0] if precision == "int8" else precision

    def compile(self, component: Component, graph: Graph, profile: Profile) -> OpenVINOGraph:
        store = open_store() if self._store is None else self._store
        threads = machine.threads() if profile.threads is None else profile.threads
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._hint(profile.precision),
            **_threading(threads, profile),
        }
        what = {
            "backend": self.name,
            "component": component.spec.name,
            "weights": component.weights_sha256,
            "graph": graph.sha256,
            "shapes": ", ".join(f"{d}={n}" for d, n in profile.dims.items()),
            "precision": profile.precision,
        }
        made = {
            "OpenVINO": str(library().get_version()),
            "device": f"{DEVICE} {self._core.get_property(DEVICE, 'FULL_DEVICE_NAME')}",
            "processor": machine.processor(),
            "threads": str(threads),
        }
        if store is not None:
            compiled = self._from_store(store, what, made, graph, config)
            if compiled is not None:
                return compiled
        model = self._core.read_model(graph.path)
        agree(component, graph, *(_names(ports) for ports in (model.inputs, model.outputs)))
        model.reshape({t.name: _partial(t.shape, profile.dims) for t in graph.inputs})
        compiled = self._core.compile_model(model, DEVICE, config)
        if store is not None:
            store.keep(what, made, lambda file: _export(compiled, file))
        return OpenVINOGraph(graph, compiled, None)

    def _from_store(
        self, store: Store, what: Key, made: Key, graph: Graph, config: Mapping[str, Any]
    ) -> OpenVINOGraph | None:
        path = store.find(what, made)
        if path is None:
            return None
        try:
            blob = _mapped(path)
            tensor = library().Tensor(blob, shared_memory=True)
            return OpenVINOGraph(graph, self._core.import_model(tensor, DEVICE, config), blob)
        except Exception as error:
            store.discard(what, made, f"OpenVINO refuses it: {first_line(error)}")
            return None


class OpenVINOGraph:
    """One compiled graph. `blob` is the memory that it was read from, and must outlive it."""

    def __init__(self, graph: Graph, compiled: Any, blob: Array | None) -> None:
        self._graph = graph
        self._compiled = compiled
        self._blob = blob

    def open(self, held: Mapping[str, Array]) -> Run:
        """All inputs, held ones too, are copied into the request's own memory. Shared memory would
        spare microseconds; and a request of free dimensions that mixes both crashes (2026.4.1)."""
        request = self._compiled.create_infer_request()
        tensors = {t.name: request.get_tensor(t.name) for t in self._graph.inputs}
        # A tensor of a fixed shape stays where it is: its array is looked up once, here.
        views = {
            name: tensor.data
            for name, tensor in tensors.items()
            if self._compiled.input(name).partial_shape.is_static
        }

        def put(values: Mapping[str, Array]) -> None:
            for name, value in values.items():
                view = views.get(name)
                if view is None:
                    tensors[name].shape = value.shape
                    view = tensors[name].data
                np.copyto(view, value)

        put(held)
        ports = [port.names for port in self._compiled.outputs]
        wanted = [t.name for t in self._graph.outputs]
        outputs = [(n, next(i for i, names in enumerate(ports) if n in names)) for n in wanted]

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            put(feeds)
            # `infer` would work on this thread too, and on a busy machine wait for a time slice.
            request.start_async()
            request.wait()
            return {name: request.get_output_tensor(i).data.copy() for name, i in outputs}

        return run

    def close(self) -> None:
        self._compiled = None
        self._blob = None


def _threading(threads: int, profile: Profile) -> dict[str, Any]:
    """Options of the processor's plugin. Kinds of cores are named only where there are two."""
    kinds = {
        None: {},
        True: {"SCHEDULING_CORE_TYPE": "PCORE_ONLY"},
        False: {"SCHEDULING_CORE_TYPE": "ANY_CORE"},
    }
    return {
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": profile.pin,
        "ENABLE_HYPER_THREADING": profile.hyper_threads,
        **kinds[profile.fast_only],
    }


def _export(compiled: Any, file: BinaryIO) -> None:
    through = _Through(file)
    compiled.export_model(through)
    if through.error is not None:
        raise through.error


class _Through(io.BytesIO):
    """A BytesIO, because `export_model` takes nothing else, that writes to a file: the compiled
    form of a large network never lies in memory a second time.

    error   the first one in writing: the library's stream swallows it
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error if self.error is None else self.error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


def _mapped(path: Path) -> Array:
    """The bytes of a file, mapped; writable to this process only, as openvino.Tensor demands."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _names(ports: Any) -> set[str]:
    return {name for port in ports for name in port.names}


def _partial(shape: tuple[int | str, ...], dims: Mapping[str, int]) -> Any:
    return library().PartialShape([dims.get(d, -1) if isinstance(d, str) else d for d in shape])


def _version(openvino: Any) -> str:
    """2026.4.1 out of 2026.4.1-22982-e213a147257-releases/2026/4"""
    return str(openvino.get_version()).partition("-")[0]
