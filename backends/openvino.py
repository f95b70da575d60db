"""OpenVINO: the embedded default engine, on the processor unless another device is asked for.

Graphs are compiled for the Profile's shapes, and the compiled form is kept in the machine's cache:
the next start maps it into memory, which takes a third of the time and of the memory. So does
this start, where the network is large: what was compiled is let go and read back.

checked by  tests/contract/test_backends.py, tests/unit/test_backend_openvino.py
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from ..engine.errors import UnknownName
from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Precision, Profile
from . import devices, machine
from .base import GraphBackend, Run, agree, first_line
from .cache import Key, Store, open_store
from .mapping import Mapped
from .openvino_pairs import COMMON
from .openvino_rewrites import Rewrites
from .openvino_weights import remap, widen

log = logging.getLogger("sdengine.backends")

LARGE = 256 << 20  # bytes of a compiled network
# One at a time: while it is compiled a network is in memory two or three times.
BUILDING = Lock()


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

    def probe_on(self, device: str) -> Probe:
        """As `probe`, for another device than the processor: CPU, GPU, GPU.1, NPU, AUTO."""
        if device.upper().partition(".")[0] not in devices.KINDS:
            raise UnknownName("device", device, devices.KINDS)
        if not self._probe.ok or device == devices.CPU:
            return self._probe
        return devices.probe(self._core, device, _version(library()))

    @cached_property
    def _probe(self) -> Probe:
        mend = "pip install 'openvino>=2026.2'"
        try:
            openvino = library()
        except ModuleNotFoundError:
            return Probe(False, "the package openvino is not installed", mend)
        except Exception as error:
            return Probe(False, f"openvino cannot be imported: {first_line(error)}", mend)
        return devices.probe(self._core, devices.CPU, _version(openvino))

    @cached_property
    def _core(self) -> Any:
        return library().Core()

    def _hint(self, precision: Precision, device: str = devices.CPU) -> Precision:
        """What layers compute in that are not int8: of an int8 network, the fastest there is."""
        able = devices.precisions(self._core, device) if precision == "int8" else (precision,)
        return next(p for p in able if p != "int8")

    def compile(self, component: Component, graph: Graph, profile: Profile) -> OpenVINOGraph:
        core, asked = self._core, profile.device
        device = devices.CPU if asked is None else devices.resolve(core, asked)
        assert device is not None, f"probe_on({asked}) said that it is there"
        threads = machine.threads() if profile.threads is None else profile.threads
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._hint(profile.precision, device),
            **devices.options(device, threads, profile),
        }
        int8, half = profile.precision == "int8", config["INFERENCE_PRECISION_HINT"] == "bf16"
        here = device == devices.CPU
        # A prologue has nothing in common: guided or not, it is one network.
        paired = profile.paired and here and any(t.name in COMMON for t in graph.inputs)
        rewrites = Rewrites(here, int8, half, paired)
        what = {
            "backend": self.name,
            "component": component.spec.name,
            "weights": component.weights_sha256,
            "graph": graph.sha256,
            "shapes": ", ".join(f"{d}={n}" for d, n in profile.dims.items()),
            "precision": profile.precision,
            **({"rows": "in pairs"} if paired else {}),
        }
        made = {
            "OpenVINO": str(library().get_version()),
            **devices.maker(core, device),
            "processor": machine.processor(),
            "threads": str(threads),
            **rewrites.recipes(),
        }
        store = self._place(device)
        kept = None if store is None else self._from_store(store, what, made, graph, device, config)
        if kept is not None:
            return kept

        def build() -> tuple[Any, list[Mapped]]:
            model = core.read_model(graph.path)
            agree(component, graph, *(_names(ports) for ports in (model.inputs, model.outputs)))
            model.reshape({t.name: _partial(t.shape, profile.dims) for t in graph.inputs})
            whole = remap(model, component.weights) if here and int8 else None
            rewrites.apply(core, model)
            wide = None
            if here and store is not None:
                wide = widen(model, component.weights, store.root)
            sources = [mapped for mapped in (whole, wide) if mapped is not None]
            with _passing(sources):
                return core.compile_model(model, device, config), sources

        with BUILDING:
            compiled, sources = build()
            if store is None:
                return OpenVINOGraph(graph, compiled, sources)
            with _passing(sources):
                path = store.keep(what, made, partial(_export, compiled))
            if path is None or path.stat().st_size < LARGE:
                return OpenVINOGraph(graph, compiled, sources)
            # What was compiled holds all weights once more in float32; what is read back does not.
            del compiled, sources
        again = self._from_store(store, what, made, graph, device, config)
        return OpenVINOGraph(graph, *build()) if again is None else again

    def _place(self, device: str) -> Store | None:
        """Where compiled networks are kept; None for those that cannot be."""
        if not devices.keeps(self._core, device):
            return None
        return open_store() if self._store is None else self._store

    def _from_store(
        self,
        store: Store,
        what: Key,
        made: Key,
        graph: Graph,
        device: str,
        config: Mapping[str, Any],
    ) -> OpenVINOGraph | None:
        path = store.find(what, made)
        if path is None:
            return None
        try:
            blob = Mapped(path)
            with blob.passing() as data:
                tensor = library().Tensor(data, shared_memory=True)
                compiled = self._core.import_model(tensor, device, config)
            return OpenVINOGraph(graph, compiled, [blob])
        except Exception as error:
            store.discard(what, made, f"OpenVINO refuses it: {first_line(error)}")
            return None


class OpenVINOGraph:
    """One compiled graph. `sources` are what it, or its weights, were read from, and must outlive
    it."""

    def __init__(self, graph: Graph, compiled: Any, sources: Sequence[Mapped]) -> None:
        self._graph = graph
        self._compiled = compiled
        self._sources = sources

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

    def rest(self) -> None:
        self._compiled.release_memory()

    def close(self) -> None:
        self._compiled = None
        self._sources = ()


@contextmanager
def _passing(sources: Sequence[Mapped]) -> Iterator[None]:
    with ExitStack() as stack:
        for mapped in sources:
            stack.enter_context(mapped.passing())
        yield


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


def _names(ports: Any) -> set[str]:
    return {name for port in ports for name in port.names}


def _partial(shape: tuple[int | str, ...], dims: Mapping[str, int]) -> Any:
    return library().PartialShape([dims.get(d, -1) if isinstance(d, str) else d for d in shape])


def _version(openvino: Any) -> str:
    """2026.4.1 out of 2026.4.1-22982-e213a147257-releases/2026/4"""
    return str(openvino.get_version()).partition("-")[0]
