"""A bundle as a model repository of NVIDIA's tritonserver.

    REPOSITORY/text_encoder/config.pbtxt      a model for each network, and one for its prologue
               text_encoder/1/full.onnx       a second name of the bundle's graph
               text_encoder/1/weights.safetensors
               unet/...  unet_prologue/...  vae_decoder/...
               sdengine/config.pbtxt          the whole pipeline, on the Python backend
               sdengine/1/model.py  sdengine/1/bundle/

Files are hard links where the disk has them: a graph's weights must lie in its own folder, and no
runtime follows a symbolic link out of it. No tritonserver takes part: it reads this when it starts.

checked by  tests/unit/test_export_triton.py (tritonclient's own reader of configs, ONNX Runtime)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backends.plans import TRT
from ..engine.bundle import MANIFEST, Bundle, open_bundle
from ..engine.errors import RequestError, StorageError
from ..engine.spec import Component, Graph, TensorSpec
from .repro import link
from .write import is_free, partial_folder, storage_errors

TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
GRAPHS = ("full", "prologue")  # what a picture takes; the rest are trades and tiles
PIPELINE = "sdengine"
CPU = "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
# TensorRT by way of ONNX Runtime: an engine in a file would be of one GPU and one library alone
TENSORRT = (
    "instance_group [ { count: 1 kind: KIND_GPU } ]\n"
    "optimization { execution_accelerators {\n"
    '  gpu_execution_accelerator [ { name: "tensorrt" } ]\n'
    "} }\n"
)
MODEL = '''"""The whole pipeline. Needs sdengine in the Python of tritonserver."""

from pathlib import Path

from sdengine.serve.triton_model import Model


class TritonPythonModel(Model):
    bundle = Path(__file__).with_name("bundle")
'''
PIPELINE_CONFIG = f"""name: "{PIPELINE}"
backend: "python"
max_batch_size: 0
input [
  {{ name: "request" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "image" data_type: TYPE_STRING dims: [ -1 ] optional: true }},
  {{ name: "mask" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "depth" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "pictures" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "about" data_type: TYPE_STRING dims: [ 1 ] }}
]
{CPU}parameters {{ key: "backend" value {{ string_value: "auto" }} }}
"""


@dataclass(frozen=True)
class Runner:
    """Which of tritonserver's backends runs a target's graphs, and what its config says more."""

    backend: str
    more: str = ""


RUNNERS = {
    "onnxruntime": Runner("onnxruntime"),
    "openvino": Runner("openvino", CPU),
    TRT: Runner("onnxruntime", TENSORRT),
}


def repository(bundle: Path, out: Path, target: str | None = None) -> Path:
    """Write the model repository of a bundle into the folder `out`; returns `out`.

    target      of RUNNERS; None takes the bundle's first one that tritonserver can run
    raises      BundleError, RequestError, StorageError
    """
    opened = open_bundle(bundle)
    chosen = _chosen(opened, target)
    out = out.absolute()
    if not is_free(out):
        raise StorageError(
            f"{out} is not empty", hint="name a folder that is not there yet: --out models"
        )
    with partial_folder(out, 0) as folder:
        for name, graph, weights in _models(opened, chosen):
            version = folder / name / "1"
            version.mkdir(parents=True)
            link(graph.path, version / graph.path.name)
            link(weights, version / weights.name)
            config = network_config(name, graph, RUNNERS[chosen])
            (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
        _pipeline(opened, folder / PIPELINE)
        with storage_errors(out):
            os.rename(folder, out)
    return out


def _chosen(bundle: Bundle, target: str | None) -> str:
    there = [name for name in bundle.targets if name in RUNNERS]
    if target is None and there:
        return there[0]
    if target in there:
        return str(target)
    wanted = target if target in RUNNERS else next(iter(RUNNERS))
    asked = ", ".join(RUNNERS) if target is None else target
    proved = ", ".join(bundle.targets) if bundle.targets else "nothing"
    raise RequestError(
        f"{bundle.path} was not proved on {asked} for tritonserver; it was on {proved}",
        hint=f"sdengine export {bundle.path} --target {wanted}; then this again",
    )


def _models(bundle: Bundle, target: str) -> Iterator[tuple[str, Graph, Path]]:
    """(name of the model, its graph, the weights that it points into)"""
    for name, component in bundle.components.items():
        found: Component = component.typed.get("f16", component) if target == TRT else component
        for which in GRAPHS:
            if which in found.graphs:
                model = name if which == "full" else f"{name}_{which}"
                yield model, found.graphs[which], found.weights


def network_config(name: str, graph: Graph, runner: Runner) -> str:
    """config.pbtxt of one graph, its batch an axis like any other."""
    return (
        f"name: {json.dumps(name)}\n"
        f"backend: {json.dumps(runner.backend)}\n"
        f"default_model_filename: {json.dumps(graph.path.name)}\n"
        "max_batch_size: 0\n"
        f"{_tensors('input', graph.inputs)}{_tensors('output', graph.outputs)}{runner.more}"
    )


def _tensors(kind: str, tensors: Iterable[TensorSpec]) -> str:
    each = ",\n".join(f"  {_tensor(one)}" for one in tensors)
    return f"{kind} [\n{each}\n]\n"


def _tensor(tensor: TensorSpec) -> str:
    dims = ", ".join("-1" if isinstance(d, str) else str(d) for d in tensor.shape)
    name, kind = json.dumps(tensor.name), TYPES[tensor.dtype]
    return f"{{ name: {name} data_type: {kind} dims: [ {dims} ] }}"


def _pipeline(bundle: Bundle, folder: Path) -> None:
    place = folder / "1" / "bundle"
    for name in (*bundle.files, MANIFEST):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        link(bundle.path / name, place / name)
    (folder / "1" / "model.py").write_text(MODEL, encoding="utf-8")
    (folder / "config.pbtxt").write_text(PIPELINE_CONFIG, encoding="utf-8")
