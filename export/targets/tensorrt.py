"""TensorRT's graphs where there is no GPU: judged on the processor, rounding as a GPU would.

The runtime backend is backends/tensorrt.py; this one is only for parity.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ...backends import machine
from ...backends.base import agree
from ...backends.onnxruntime import OnnxGraph, OnnxRuntime
from ...backends.plans import TRT
from ...engine.errors import MissingExtra
from ...engine.ports import Probe
from ...engine.spec import Component, Graph, Precision, Profile
from ..graph.emulate import emulated
from . import Recipe, nothing

PRECISIONS: tuple[Precision, ...] = ("f16", "bf16", "int8", "fp8")
FOLDER = "session.model_external_initializers_file_folder_path"
ERRORS_ONLY = 3


def library() -> Any:
    """The onnxruntime module, which exporting for other targets does without. MissingExtra."""
    here = OnnxRuntime().probe()
    if not here.ok:
        raise MissingExtra(here.reason, hint=here.mend)
    import onnxruntime

    return onnxruntime


class Emulated(OnnxRuntime):
    """Runs typed graphs on ONNX Runtime, as `graph.emulate` has them."""

    name = TRT

    def probe(self) -> Probe:
        here = super().probe()
        return Probe(here.ok, here.reason, here.mend, PRECISIONS)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> OnnxGraph:
        model = ir.to_proto(emulated(ir.load(graph.path))).SerializeToString()
        return OnnxGraph(graph, open_session(model, component, graph, profile))


def open_session(model: bytes, component: Component, graph: Graph, profile: Profile) -> Any:
    """A session of a graph in memory whose weights lie beside `graph`."""
    ort = library()
    options = ort.SessionOptions()
    threads = machine.threads() if profile.threads is None else profile.threads
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry(FOLDER, str(graph.path.parent))
    for dim, size in profile.dims.items():
        options.add_free_dimension_override_by_name(dim, size)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    agree(
        component,
        graph,
        {t.name for t in session.get_inputs()},
        {t.name for t in session.get_outputs()},
    )
    return session


RECIPE = Recipe(TRT, PRECISIONS, Emulated, nothing)
