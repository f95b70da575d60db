"""Typed networks beside the others: graphs for TensorRT, and their weights where these change.

    unet/full.onnx ──> unet/full.f16.onnx   weights.safetensors where it is float16 already,
                                            weights.f16.safetensors where it is not
    unet/int8/full.onnx ──> unet/int8/full.int8.onnx   the quantised network's own weights

checked by  tests/parity/test_typed.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..engine.errors import ExportError
from ..engine.spec import Component, Precision
from ..engine.weights import read_header
from .containers import TensorRef, open_container
from .graph.tools import save
from .graph.typed import BF16, F16, F32, HALVES, Typed, bound, typed
from .graph.weights import TYPES
from .weights_file import write_weights

STORED = {F16: "F16", BF16: "BF16", F32: "F32"}
HALF_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}

Wants = Mapping[str, frozenset[ir.DataType]]


@dataclass(frozen=True)
class Written:
    """A typed network and what the manifest says of it.

    source      SHA-256 of the weights that it was made from
    files       those that were written
    """

    component: Component
    source: str
    recipe: Mapping[str, Any]
    files: tuple[Path, ...]


def write_typed(component: Component, bundle: Path, folder: Path, precision: Precision) -> Written:
    """The typed network of a component, its graphs written into `folder`.

    component   of the bundle, as its reader gave it
    bundle      where its files are
    folder      where the bundle is being written anew; the component's weights are in it already
    raises      TraceError; ExportError: int8 without a quantised network
    """
    origin = _origin(component, precision)
    half = HALVES[precision]
    made = {name: typed(ir.load(g.path), half) for name, g in origin.graphs.items()}
    wants = _union(made)
    weights = folder / origin.weights.relative_to(bundle)
    sha256, files = origin.weights_sha256, []
    if derived := _changed(wants, origin.weights, half):
        weights = weights.with_name(f"weights.{precision}.safetensors")
        refs = open_container(origin.weights).tensors.values()
        sha256 = write_weights(
            weights, [_as_half(t, STORED[half]) if t.name in derived else t for t in refs]
        )
        files.append(weights)
    header = read_header(weights)
    graphs = {}
    for name, model in made.items():
        path = weights.with_name(f"{name}.{precision}.onnx")
        save(bound(model, header, location=weights.name), path)
        files.append(path)
        graph_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        graphs[name] = replace(origin.graphs[name], path=path, sha256=graph_sha256)
    content = {"weights": sha256, "graphs": {n: g.sha256 for n, g in graphs.items()}}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    network = replace(
        component,
        graphs=graphs,
        weights=weights,
        weights_sha256=sha256,
        key=key,
        quantised={},
        typed={},
        engines=(),
    )
    recipe = {"half": half.name.lower(), "cast_weights": len(derived)}
    return Written(network, origin.weights_sha256, recipe, tuple(files))


def _origin(component: Component, precision: Precision) -> Component:
    if precision != "int8":
        return component
    if precision not in component.quantised:
        raise ExportError(
            f"{component.spec.name} has no quantised network to type",
            hint="make it first: sdengine export BUNDLE --precision int8",
        )
    return component.quantised[precision]


def _union(made: Mapping[str, Typed]) -> Wants:
    """What all graphs together want of each weight."""
    names = {name for one in made.values() for name in one.wants}
    empty: frozenset[ir.DataType] = frozenset()
    return {n: empty.union(*(one.wants.get(n, empty) for one in made.values())) for n in names}


def _changed(wants: Wants, weights: Path, half: ir.DataType) -> frozenset[str]:
    """The weights that are only taken in half precision, and stored as something else."""
    stored = read_header(weights)
    return frozenset(
        name for name, types in wants.items()
        if types == {half} and TYPES.get(stored[name].dtype) != half
    )  # fmt: skip


def _as_half(tensor: TensorRef, dtype: str) -> TensorRef:
    """The tensor in half precision, rounded to nearest when it is written."""

    def values() -> Any:
        return tensor.torch().to(HALF_TORCH[dtype]).view(torch.uint8).reshape(-1).numpy()

    return TensorRef(tensor.name, dtype, tensor.shape, values)
