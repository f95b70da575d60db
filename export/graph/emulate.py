"""A typed graph in float32 that rounds where the typed one would: what a GPU computes, on a CPU.

Products accumulate in float32 on a GPU, and their results are rounded once; so every node that
computes in half precision computes in float32 here, and a cast to the half type and back follows.
ONNX Runtime computes a float16 graph on a processor otherwise: in float32 from node to node,
without the roundings between, so that what overflows on a GPU stays finite there (500 * 500 +
500 * 500 gave 500000). Casts of the graph's own it keeps.

checked by  tests/parity/test_typed.py
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .tools import copy_of
from .typed import F32, FLOATS, LAYOUT


def emulated(model: ir.Model) -> ir.Model:
    """Same inputs, outputs and weights file; no value between nodes is of a half type."""
    model = copy_of(model)
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype in FLOATS and value.dtype != F32:
            _widen(graph, value)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype not in FLOATS or value.dtype == F32:
                continue
            half = value.dtype
            assert half is not None, "a float type"
            value.type = ir.TensorType(F32)
            if node.op_type == "Cast":
                node.attributes.add(ir.AttrInt64("to", int(F32)))
            if node.op_type not in LAYOUT:
                _round(graph, node, value, half)
    return model


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """A constant in float32: a number anew, a weight of a file behind a cast."""
    held = value.const_value
    assert held is not None, "an initializer holds a tensor"
    if not isinstance(held, ir.ExternalTensor):
        value.const_value = ir.tensor(held.numpy().astype(np.float32), name=str(value.name))
        value.type = ir.TensorType(F32)
        return
    users = list(value.uses())
    if all(user.op_type == "Cast" for user, _ in users):
        return
    wide = ir.Value(name=f"{value.name}@wide", shape=value.shape, type=ir.TensorType(F32))
    node = ir.node("Cast", [value], {"to": int(F32)}, outputs=[wide], name=str(wide.name))
    for user, index in users:
        user.replace_input_with(index, wide)
    graph.insert_before(graph[0], [node])


def _round(graph: ir.Graph, after: ir.Node, value: ir.Value, half: ir.DataType) -> None:
    name = f"{value.name}@rounded"
    users = list(value.uses())
    steps = ir.Value(name=f"{name}/{half.name.lower()}", type=ir.TensorType(half))
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(F32))
    for user, index in users:
        user.replace_input_with(index, result)
    graph.insert_after(after, [
        ir.node("Cast", [value], {"to": int(half)}, outputs=[steps], name=str(steps.name)),
        ir.node("Cast", [steps], {"to": int(F32)}, outputs=[result], name=name),
    ])  # fmt: skip
