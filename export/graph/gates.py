"""A graph for measuring: every layer's rounding can be turned on and off by an input.

`gates` is float32 [2n]: entry 2i scales the rounding error of layer i's input, 2i + 1 that of its
weight; 0 is float, 1 is int8. One compiled graph thus measures any choice of layers.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...engine.ports import Floats
from ...engine.weights import Stored
from .quantize import Divisors, Grids, Layer, along, layers, quantized
from .tools import copy_of

GATES = "gates"


def gated(
    model: ir.Model,
    grids: Grids,
    stored: Mapping[str, Stored],
    *,
    location: str,
    order: Sequence[Layer],
    divisors: Divisors,
) -> ir.Model:
    """The graph with the further input `gates`.

    grids, divisors    as for `quantized`; a layer without grids keeps its input in float
    stored      of the file with int8 weights, `location`; the float weights stay where they are
    order       the layers that the gates belong to
    """
    model = copy_of(model)
    twin = quantized(model, grids, stored, location=location, divisors=divisors)
    graph = model.graph
    gates = ir.Value(
        name=GATES, shape=ir.Shape([2 * len(order)]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.inputs.append(gates)
    places = {layer.name: i for i, layer in enumerate(order)}
    rounded = _Rounded(graph, twin.graph)
    for layer in layers(model):
        if layer.name not in places:
            continue
        node = next(n for n in graph if n.name == layer.name)
        other = next(n for n in twin.graph if n.name == layer.name)
        for side in range(2):
            x, y = node.inputs[side], other.inputs[side]
            assert x is not None, "a product has two sides"
            assert y is not None, "a product has two sides"
            if not rounded.differs(y):
                continue
            gate = _pick(graph, node, gates, 2 * places[layer.name] + side)
            near = rounded.of(y, node)
            if layer.name in divisors:
                by = along(divisors[layer.name], layer)
                # of a product's weight the channels are the first axis, of a convolution's the
                # second
                back = by if side == 0 else 1 / (by if layer.op == "Conv" else by[:, None])
                near = _scaled(graph, node, near, back, f"{gate.name}/back")
            node.replace_input_with(side, _blend(graph, node, x, near, gate))
    return model


class _Rounded:
    """Nodes of the twin, copied into the graph when they are first needed."""

    def __init__(self, graph: ir.Graph, twin: ir.Graph) -> None:
        self._graph, self._twin = graph, twin
        self._own = {str(v.name): v for n in graph for v in n.outputs}
        self._own |= {str(v.name): v for v in graph.inputs}
        self._own |= {str(v.name): v for v in graph.initializers.values()}
        self._made: dict[str, ir.Value] = {}

    def of(self, value: ir.Value, before: ir.Node) -> ir.Value:
        name = str(value.name)
        if name in self._made:
            return self._made[name]
        producer = value.producer()
        if not self.differs(value) and name in self._own:
            return self._own[name]
        if value.is_initializer():
            made = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=value.const_value
            )
            self._graph.register_initializer(made)
        else:
            assert producer is not None, "neither computed nor given"
            inputs = [None if v is None else self.of(v, before) for v in producer.inputs]
            made = ir.Value(name=f"{name}/rounded", shape=value.shape, type=value.type)
            attributes = {a.name: a.value for a in producer.attributes.values()}
            node = ir.node(
                producer.op_type, inputs, attributes, outputs=[made], name=f"{name}/rounded"
            )
            self._graph.insert_before(before, [node])
        self._made[name] = made
        return made

    def differs(self, value: ir.Value) -> bool:
        """Whether the twin rounds it: here, or before no more than a change of layout or type. A
        linear layer's weight keeps its name: it is the Transpose behind the rounding."""
        node = value.producer()
        if node is None:
            return False
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return True
        first = node.inputs[0] if node.inputs else None
        return node.op_type in ("Transpose", "Cast") and first is not None and self.differs(first)


def _pick(graph: ir.Graph, before: ir.Node, gates: ir.Value, index: int) -> ir.Value:
    name = f"{GATES}/{index}"
    tensor = ir.tensor(np.array(index, np.int64), name=f"{name}/index")
    place = ir.Value(
        name=f"{name}/index",
        shape=ir.Shape(()),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=tensor,
    )
    graph.register_initializer(place)
    gate = ir.Value(name=name)
    graph.insert_before(before, [ir.node("Gather", [gates, place], outputs=[gate], name=name)])
    return gate


def _scaled(graph: ir.Graph, before: ir.Node, x: ir.Value, by: Floats, name: str) -> ir.Value:
    tensor = ir.tensor(by, name=f"{name}/by")
    factors = ir.Value(
        name=f"{name}/by",
        shape=ir.Shape(by.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(factors)
    made = ir.Value(name=name)
    graph.insert_before(before, [ir.node("Mul", [x, factors], outputs=[made], name=name)])
    return made


def _blend(
    graph: ir.Graph, before: ir.Node, x: ir.Value, rounded: ir.Value, gate: ir.Value
) -> ir.Value:
    """x + gate (rounded - x)"""
    name = str(gate.name)
    error, share, result = (ir.Value(name=f"{name}/{n}") for n in ("error", "share", "result"))
    nodes = [
        ir.node("Sub", [rounded, x], outputs=[error], name=f"{name}/error"),
        ir.node("Mul", [error, gate], outputs=[share], name=f"{name}/share"),
        ir.node("Add", [x, share], outputs=[result], name=f"{name}/result"),
    ]
    graph.insert_before(before, nodes)
    return result
