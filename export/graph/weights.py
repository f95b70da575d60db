"""Bind weights to a file: graph inputs become initializers that point into a safetensors file.

Numbers change only by the rounding that the checkpoint itself holds: the tensor's own bytes are
used, widened by a `Cast` where they are of a half type.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ...engine.weights import Stored
from .tools import copy_of

TYPES = {
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "I8": ir.DataType.INT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}


def bind_weights(model: ir.Model, stored: Mapping[str, Stored], *, location: str) -> ir.Model:
    """Every graph input that `stored` names becomes an initializer with external data.

    location    the file's name; it lies in the graph's own folder
    """
    model = copy_of(model)
    graph = model.graph
    casts: list[ir.Node] = []
    for value in [v for v in graph.inputs if v.name in stored]:
        graph.inputs.remove(value)
        casts += _bind(graph, value, stored[str(value.name)], location)
    if casts:
        graph.insert_before(graph[0], casts)
    return model


def _bind(graph: ir.Graph, value: ir.Value, where: Stored, location: str) -> list[ir.Node]:
    dtype, name = TYPES[where.dtype], str(value.name)
    tensor = ir.ExternalTensor(
        location, where.offset, where.nbytes, dtype, shape=ir.Shape(where.shape), name=name
    )
    weight = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    cast = None
    if dtype != ir.DataType.FLOAT:
        wide = ir.Value(
            name=f"{name}/f32", shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT)
        )
        attributes = {"to": int(ir.DataType.FLOAT)}
        cast = ir.node("Cast", [weight], attributes, outputs=[wide], name=f"{name}/f32")
    value.replace_all_uses_with(weight if cast is None else cast.outputs[0])
    if cast is not None:
        cast.replace_input_with(0, weight)
    graph.register_initializer(weight)
    return [] if cast is None else [cast]
