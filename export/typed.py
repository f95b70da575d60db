"""Typed networks beside the others: graphs for TensorRT, and their weights where these change.

    unet/full.onnx ──> unet/full.f16.onnx   weights.safetensors where it is float16 already,
                                            weights.f16.safetensors where it is not
    unet/int8/full.onnx ──> unet/int8/full.int8.onnx   the quantised network's own weights
    unet/full.onnx ──> unet/full.fp8.onnx   weights.fp8.safetensors, made of weights.safetensors

checked by  tests/parity/test_typed.py, tests/parity/test_fp8.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..engine.errors import ExportError
from ..engine.spec import Component, Precision
from ..engine.weights import Stored, read_header
from .containers import TensorRef, open_container
from .graph.quantize import E4M3, SCALE, quantized
from .graph.tools import save
from .graph.typed import BF16, F16, F32, HALVES, Typed, bound, typed
from .graph.weights import TYPES
from .quantize import Choice, rounded_weights
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


def write_typed(
    component: Component,
    bundle: Path,
    folder: Path,
    precision: Precision,
    choice: Choice | None = None,
) -> Written:
    """The typed network of a component, its graphs written into `folder`.

    component   of the bundle, as its reader gave it
    bundle      where its files are
    folder      where the bundle is being written anew; the component's weights are in it already
    choice      for fp8: what is rounded to which grid; None: nothing, all of it is in float16
    raises      TraceError; ExportError: int8 without a quantised network
    """
    origin = _origin(component, precision)
    half = HALVES[precision]
    models = {name: ir.load(g.path) for name, g in origin.graphs.items()}
    refs: Sequence[TensorRef] = list(open_container(origin.weights).tensors.values())
    if choice is not None:
        refs = rounded_weights(origin, models, choice, E4M3)
        models = _rounding(models, refs, choice)
    made = {name: typed(model, half) for name, model in models.items()}
    derived = _changed(_union(made), refs, half)
    weights = folder / origin.weights.relative_to(bundle)
    sha256, files = origin.weights_sha256, []
    if derived or choice is not None:
        weights = weights.with_name(f"weights.{precision}.safetensors")
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
    if choice is not None:
        recipe |= {"fp8_layers": len(choice.grids), "fp8": "e4m3, amax / 448"}
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


def _rounding(
    models: Mapping[str, ir.Model], refs: Sequence[TensorRef], choice: Choice
) -> dict[str, ir.Model]:
    """The Q/DQ twins, for typing: they point to a file that is still to be written, and have their
    weights' scales in themselves."""
    stored = {t.name: Stored(t.dtype, t.shape, 0, t.nbytes) for t in refs}
    scales = {t.name: t for t in refs if t.name.endswith(SCALE)}
    found = {}
    for name, model in models.items():
        twin = quantized(model, choice.grids, stored, location="", divisors=choice.divisors)
        for key in scales.keys() & twin.graph.initializers.keys():
            numbers = scales[key].torch().numpy()
            twin.graph.initializers[key].const_value = ir.tensor(numbers, name=key)
        found[name] = twin
    return found


def _changed(wants: Wants, refs: Sequence[TensorRef], half: ir.DataType) -> frozenset[str]:
    """The weights that are only taken in half precision, and stored as something else."""
    stored = {t.name: t.dtype for t in refs}
    return frozenset(
        name for name, types in wants.items()
        if types == {half} and TYPES.get(stored[name]) != half
    )  # fmt: skip


def _as_half(tensor: TensorRef, dtype: str) -> TensorRef:
    """The tensor in half precision, rounded to nearest when it is written."""

    def values() -> Any:
        return tensor.torch().to(HALF_TORCH[dtype]).view(torch.uint8).reshape(-1).numpy()

    return TensorRef(tensor.name, dtype, tensor.shape, values)
