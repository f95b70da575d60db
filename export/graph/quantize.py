"""Eight-bit twins: a graph whose layers multiply 8-bit weights by activations rounded to 8 bits.

A layer is a convolution or a product of an activation with a weight; an attention's two products
have no weight. Around each chosen one stand QuantizeLinear and DequantizeLinear, which ONNX
Runtime, OpenVINO and TensorRT all take for "compute this in 8 bits". Weights are rounded one output
channel at a time, symmetric; activations with one scale for the tensor, after each channel was
divided by a number of its own, which the weight is multiplied by. What numbers are rounded to is
data: `INT8`, `E4M3`.

source      ONNX operator specifications, opset 21; Jacob et al. 2017, arXiv:1712.05877; the
            channels' numbers: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438; E4M3:
            Micikevicius et al. 2022, arXiv:2209.05433
checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...engine.ports import Floats
from ...engine.weights import Stored
from .tidy import drop_unused
from .tools import copy_of
from .weights import TYPES

SCALE = ".scale"  # of a weight, behind its name


@dataclass(frozen=True)
class Layer:
    """One product of a graph.

    weight      LDM name; None: both sides are activations (attention)
    inputs      the names of the activations: one, or an attention's two
    scores      an attention's first product, whose result goes into a softmax
    """

    name: str
    op: str
    weight: str | None
    inputs: tuple[str, ...]
    scores: bool = False


@dataclass(frozen=True)
class Steps:
    """The numbers about zero that a value over its scale is rounded to.

    name        of the precision, and of what stands for it in the graph
    stored      as safetensors spells it
    largest     where a value's largest goes
    """

    name: str
    stored: str
    dtype: np.dtype[Any]
    largest: float

    def of(self, values: Floats) -> np.ndarray:
        """Rounded to nearest; beyond the largest becomes the largest. Values over their scale."""
        kept = np.clip(values, -self.largest, self.largest)
        return (np.rint(kept) if self.dtype.kind == "i" else kept).astype(self.dtype)


INT8 = Steps("int8", "I8", np.dtype(np.int8), 127.0)
E4M3 = Steps("fp8", "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), 448.0)
STORED = {s.stored: s for s in (INT8, E4M3)}


@dataclass(frozen=True)
class Grid:
    """The 256 values an activation is rounded to: scale * (q - zero).

    zero        None: q is one of `steps`; else q is uint8, 0..255
    """

    scale: float
    zero: int | None = None
    steps: Steps = INT8


Grids = Mapping[str, tuple[Grid, ...]]  # layer -> one for each input; () leaves them in float
Divisors = Mapping[str, Floats]  # layer -> [C], what the channels of its input are divided by


def layers(model: ir.Model) -> list[Layer]:
    """The products of a graph, in order of use."""
    found = []
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        x, y = node.inputs[0], node.inputs[1]
        assert x is not None, "a product has two sides"
        assert y is not None, "a product has two sides"
        weight = _source(y)
        inputs = (str(x.name), str(y.name)) if weight is None else (str(x.name),)
        name = None if weight is None else str(weight.name)
        scores = weight is None and _into_softmax(node)
        found.append(Layer(str(node.name), node.op_type, name, inputs, scores))
    return found


def stored_tensors(model: ir.Model) -> set[str]:
    """Names of the weights that a graph takes from the component's file."""
    values = model.graph.initializers.items()
    return {str(name) for name, v in values if isinstance(v.const_value, ir.ExternalTensor)}


def quantized(
    model: ir.Model,
    grids: Grids,
    stored: Mapping[str, Stored],
    *,
    location: str,
    divisors: Divisors,
) -> ir.Model:
    """The twin of a graph, its weights in the file `location`.

    grids       the layers to change; all others stay as they are
    divisors    of those among them that have some: the file's weights are multiplied by them
    stored      what the file holds; a weight of 8 bits has its scales beside it
    """
    model = copy_of(model)
    graph = model.graph
    _rebind(graph, stored, location)
    rounded: dict[tuple[str, Grid, bytes], ir.Value] = {}
    divided: dict[tuple[str, bytes], ir.Value] = {}
    values = {str(v.name): v for node in graph for v in node.outputs}
    values |= {str(v.name): v for v in graph.inputs}
    for layer in layers(model):
        node = next(n for n in graph if n.name == layer.name)
        for i, (name, grid) in enumerate(
            zip(layer.inputs, grids.get(layer.name, ()), strict=False)
        ):
            by = divisors.get(layer.name)
            key = b"" if by is None else by.tobytes()
            if (name, grid, key) not in rounded:
                value = values[name]
                if by is not None:
                    if (name, key) not in divided:
                        at = f"{name}/divided_{len(divided)}"
                        factors = _constant(graph, f"{at}/factors", along(1 / by, layer))
                        divided[name, key] = _product(graph, node, value, factors, at)
                    value = divided[name, key]
                rounded[name, grid, key] = _round(graph, node, value, grid, len(rounded))
            node.replace_input_with(i, rounded[name, grid, key])
    drop_unused(graph)
    return model


def rounded_weight(weight: Floats, steps: Steps = INT8) -> tuple[np.ndarray, Floats]:
    """Steps in the weight's shape, and float32 scales: one for each entry of the first axis."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = np.where(largest > 0, largest / steps.largest, 1).astype(np.float32)
    return steps.of(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), scale


def along(values: Floats, layer: Layer) -> Floats:
    """[C] in the shape that multiplies the channels of the layer's input."""
    return values.astype(np.float32).reshape((-1, 1, 1) if layer.op == "Conv" else (-1,))


def _into_softmax(node: ir.Node) -> bool:
    users = [user for user, _ in node.outputs[0].uses()]
    users += [
        after for user in users if user.op_type == "Add" for after, _ in user.outputs[0].uses()
    ]
    return any(user.op_type == "Softmax" for user in users)


def _source(value: ir.Value) -> ir.Value | None:
    """The initializer behind a Cast, a Transpose or a DequantizeLinear."""
    for _ in range(4):
        if value.is_initializer():
            return value
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Transpose", "DequantizeLinear"):
            return None
        first = node.inputs[0]
        if first is None:
            return None
        value = first
    return None


def _rebind(graph: ir.Graph, stored: Mapping[str, Stored], location: str) -> None:
    """Every weight from the other file; those of 8 bits there through a DequantizeLinear."""
    for name in [n for n, v in graph.initializers.items()
                 if isinstance(v.const_value, ir.ExternalTensor)]:  # fmt: skip
        old = graph.initializers[name]
        where = stored[name]
        if where.dtype not in STORED:
            _external(old, where, location)
            continue
        weight = ir.Value(name=f"{name}/{STORED[where.dtype].name}")
        scale = ir.Value(name=name + SCALE)
        _external(weight, where, location)
        _external(scale, stored[name + SCALE], location)
        wide = old
        for user, _ in old.uses():
            if user.op_type == "Cast":
                wide = user.outputs[0]
        made = ir.Value(
            name=f"{name}/float", shape=ir.Shape(where.shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        node = ir.node(
            "DequantizeLinear", [weight, scale], {"axis": 0}, outputs=[made], name=f"{name}/float"
        )
        del graph.initializers[name]
        wide.replace_all_uses_with(made)
        graph.register_initializer(weight)
        graph.register_initializer(scale)
        graph.insert_before(graph[0], [node])


def _external(value: ir.Value, where: Stored, location: str) -> None:
    dtype = TYPES[where.dtype]
    shape = ir.Shape(where.shape)
    value.const_value = ir.ExternalTensor(
        location, where.offset, where.nbytes, dtype, shape=shape, name=str(value.name)
    )
    value.shape, value.type = shape, ir.TensorType(dtype)


def _round(graph: ir.Graph, before: ir.Node, value: ir.Value, grid: Grid, index: int) -> ir.Value:
    """QuantizeLinear and DequantizeLinear behind a value."""
    name = f"{value.name}/{grid.steps.name}_{index}"
    zero = grid.steps.dtype.type(0) if grid.zero is None else np.uint8(grid.zero)
    pair = [_constant(graph, f"{name}/{n}", v)
            for n, v in (("scale", np.float32(grid.scale)), ("zero", zero))]  # fmt: skip
    steps = ir.Value(name=f"{name}/steps")
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.insert_before(before, [
        ir.node("QuantizeLinear", [value, *pair], outputs=[steps], name=f"{name}/steps"),
        ir.node("DequantizeLinear", [steps, *pair], outputs=[result], name=name),
    ])  # fmt: skip
    return result


def _product(
    graph: ir.Graph, before: ir.Node, value: ir.Value, factors: ir.Value, name: str
) -> ir.Value:
    made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.insert_before(before, [ir.node("Mul", [value, factors], outputs=[made], name=name)])
    return made


def _constant(graph: ir.Graph, name: str, value: np.generic | Floats) -> ir.Value:
    tensor = ir.tensor(np.asarray(value), name=name)
    made = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(made)
    return made
