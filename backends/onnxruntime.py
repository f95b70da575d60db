"""ONNX Runtime on the processor: float32, and int8 graphs whose other layers are float32.

checked by  tests/contract/test_backends.py, tests/unit/test_backend_onnxruntime.py
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from typing import Any

from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Profile
from . import machine
from .base import GraphBackend, Run, agree, first_line

# Both ship the same module `onnxruntime`: the one installed last overwrites half of the other.
WHEELS = ("onnxruntime", "onnxruntime-gpu")
ERRORS_ONLY = 3


class OnnxRuntime(GraphBackend):
    name = "onnxruntime"

    def probe(self) -> Probe:
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        installed = [name for name in WHEELS if _installed(name)]
        if len(installed) > 1:
            return Probe(
                False,
                f"{' and '.join(installed)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(installed)} && pip install 'onnxruntime>=1.22'",
            )
        mend = "pip install 'onnxruntime>=1.22'"
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            return Probe(False, "the package onnxruntime is not installed", mend)
        except Exception as error:
            return Probe(False, f"onnxruntime cannot be imported: {first_line(error)}", mend)
        onnxruntime.disable_telemetry_events()
        reason = f"ONNX Runtime {onnxruntime.__version__} on CPU, {machine.threads()} threads"
        return Probe(True, reason, precisions=("f32", "int8"), speed=20)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> OnnxGraph:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = (
            machine.threads() if profile.threads is None else profile.threads
        )
        options.inter_op_num_threads = 1
        if profile.pin and (places := machine.places(options.intra_op_num_threads)[1:]):
            # processors counted from 1, of all threads but the caller's own
            fixed = ";".join(str(cpu + 1) for cpu in places)
            options.add_session_config_entry("session.intra_op_thread_affinities", fixed)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = ERRORS_ONLY
        # Else it turns int8 inputs into uint8, and 1.32 fails where a reshape follows.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        for dim, size in profile.dims.items():
            options.add_free_dimension_override_by_name(dim, size)
        session = onnxruntime.InferenceSession(
            str(graph.path), options, providers=["CPUExecutionProvider"]
        )
        inputs, outputs = session.get_inputs(), session.get_outputs()
        agree(component, graph, {t.name for t in inputs}, {t.name for t in outputs})
        return OnnxGraph(graph, session)


class OnnxGraph:
    """One session. Held inputs stay as they are; results are new arrays in each call."""

    def __init__(self, graph: Graph, session: Any) -> None:
        self._session = session
        self._outputs = [t.name for t in graph.outputs]

    def open(self, held: Mapping[str, Array]) -> Run:
        session, outputs, fixed = self._session, self._outputs, dict(held)

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(outputs, session.run(outputs, fixed | dict(feeds)), strict=True))

        return run

    def close(self) -> None:
        self._session = None


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
