"""How much a graph computes: multiply-adds of its convolutions and matrix products.

checked by  tests/parity/test_cut.py (against torch's own counter)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from ...engine.errors import TraceError


def multiply_adds(model: ir.Model, dims: Mapping[str, int]) -> int:
    """Multiply-adds of one run with named dimensions of these sizes; raises as `by_node`."""
    return sum(by_node(model, dims).values())


def by_node(model: ir.Model, dims: Mapping[str, int]) -> dict[str, int]:
    """Name of each product -> its multiply-adds, with named dimensions of these sizes.

    raises      TraceError when the shape of a product cannot be told
    """
    proto = ir.to_proto(model)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    return {str(node.name): _of(node) for node in inferred.graph}


def _of(node: ir.Node) -> int:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    # A convolution sums over all of a filter, a product over the last axis of its first factor.
    summed = _shape(node, 1)[1:] if node.op_type == "Conv" else _shape(node, 0)[-1:]
    return math.prod(_shape(node, None)) * math.prod(summed)


def _shape(node: ir.Node, of: int | None) -> tuple[int, ...]:
    """Of an input, or of the result."""
    value = node.outputs[0] if of is None else node.inputs[of]
    assert value is not None, "products have both factors"
    shape = () if value.shape is None else tuple(value.shape)
    if not shape or not all(isinstance(d, int) for d in shape):
        raise TraceError(
            f"{node.name}: {value.name} has no known shape",
            hint="the operators before it are beyond ONNX shape inference; see graph/count.py",
        )
    return tuple(int(d) for d in shape)  # type: ignore[arg-type]
