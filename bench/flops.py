"""Floating-point operations of a graph at given shapes: what any engine must compute at least.

Only matrix products count (Conv, ConvTranspose, Gemm, MatMul, and the two inside Attention): the
rest is under one percent of these networks' arithmetic, and is bound by memory. A multiplication
and an addition are two operations. An engine that computes fewer (Winograd, cached features) gets
a share over 100 % of the machine's rate, rightly: the share is of the graph's work, not of its own.

checked by  tests/unit/test_bench_flops.py: closed forms; the OpenVINO graph's own shapes; 1.356 e12
            for the full UNet of Stable Diffusion 2 at batch 2, 64x64
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..engine.errors import MissingExtra, TraceError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """flop     operations of one call
    by_type     the same, by the operator's type
    """

    flop: int
    by_type: Mapping[str, int] = field(default_factory=dict)


def count(path: Path, dims: Mapping[str, int]) -> Count:
    """Operations of one call of the ONNX graph in `path`.

    dims        a number for each named dimension of its inputs; further names are ignored
    raises      MissingExtra: no onnx_ir; TraceError: a shape that cannot be found
    """
    model = _shaped(path, dims)
    by_type: dict[str, int] = {}
    for node in model.graph.all_nodes():
        rule = RULES.get(node.op_type)
        if rule is None:
            continue
        found = rule(node, path)
        by_type[node.op_type] = by_type.get(node.op_type, 0) + found
    return Count(sum(by_type.values()), by_type)


def _shaped(path: Path, dims: Mapping[str, int]) -> Any:
    """The model with numbers for its inputs' named dimensions, and all shapes that follow."""
    try:
        import onnx_ir as ir
        from onnx_ir.passes.common import ShapeInferencePass
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"counting the operations of {path.name} needs the package {error.name}",
            hint="pip install 'sdengine[export]', or run without the distance from the limit",
        ) from error
    model = ir.load(path)
    for value in model.graph.inputs:
        assert value.shape is not None, f"{path}: input {value.name} has no shape"
        value.shape = ir.Shape([_number(d, dims, path) for d in value.shape])
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None  # what the exporter wrote there holds names
    for value in model.graph.outputs:
        value.shape = None
    return ShapeInferencePass(data_prop=True)(model).model


def _number(dim: Any, dims: Mapping[str, int], path: Path) -> int:
    if isinstance(dim, int):
        return dim
    if str(dim.value) not in dims:
        raise TraceError(
            f"{path.name} leaves dimension {dim.value!r} open, and no number was given for it",
            hint=f"give one; known are {', '.join(f'{k}={v}' for k, v in dims.items())}",
        )
    return dims[str(dim.value)]


def _shape(value: Any, node: Any, path: Path) -> Shape:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise TraceError(
            f"{path.name}: the shape of {value.name} at {node.op_type} {node.name} is not known",
            hint="its operations cannot be counted; report the graph, or leave out the limit",
        )
    return tuple(value.shape)


def _matmul(node: Any, path: Path) -> int:
    """[..., n, k] x [..., k, m]: k multiply-adds for each output; a vector has no n or m."""
    inner = _shape(node.inputs[0], node, path)[-1]
    return 2 * inner * prod(_shape(node.outputs[0], node, path))


def _gemm(node: Any, path: Path) -> int:
    transposed = node.attributes.get_int("transA", 0)
    inner = _shape(node.inputs[0], node, path)[0 if transposed else 1]
    return 2 * inner * prod(_shape(node.outputs[0], node, path))


def _conv(node: Any, path: Path) -> int:
    """Weights [out, in / groups, ...]: one multiply-add of each for each output position."""
    _, per_group, *window = _shape(node.inputs[1], node, path)
    return 2 * per_group * prod(window) * prod(_shape(node.outputs[0], node, path))


def _conv_transpose(node: Any, path: Path) -> int:
    """Weights [in, out / groups, ...], each used once for each input position."""
    _, per_group, *window = _shape(node.inputs[1], node, path)
    return 2 * per_group * prod(window) * prod(_shape(node.inputs[0], node, path))


def _attention(node: Any, path: Path) -> int:
    """QK^T and its product with V. ai.onnx.Attention: [B, H, n, d], or [B, n, H d]."""
    q, k, v = (_shape(node.inputs[i], node, path) for i in range(3))
    if len(q) == 3:
        return 2 * q[0] * q[1] * k[1] * (q[2] + v[2] * q[2] // k[2])
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


# Quantised forms count as what they stand for.
RULES: Mapping[str, Callable[[Any, Path], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}
