"""Strongly typed graphs: every tensor says what it is computed in, by explicit casts.

TensorRT takes the types of a strongly typed network from the graph and has no precision flags. So:

    in half precision   products (Conv, MatMul), what is added to them, what only moves values
    in float32          norms, softmax and what is added to its scores, sines and cosines, and all
                        that hangs on the timestep alone but its products
    as they were        integers; inputs and outputs of the graph, float32 and int64

No product is float32: compute capability 7.5 has no such product in TensorRT-RTX. An attention's
scores leave their product in half and are widened before anything is done to them; q is scaled
before it, so that they stay far below 65504.

Weights are read in the type that their user takes; what the file must hold for that is `wants`.
Q/DQ pairs stay, symmetric: TensorRT knows no zero point.

source      TensorRT developer guide, strongly typed networks
checked by  tests/parity/test_typed.py
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...engine.errors import TraceError
from ...engine.spec import Precision
from ...engine.weights import Stored
from .quantize import STORED as QUANTISED
from .tidy import drop_unused
from .tools import copy_of
from .weights import TYPES

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
FLOATS = (F32, F16, BF16)
HALVES: Mapping[Precision, ir.DataType] = {"f16": F16, "bf16": BF16, "int8": F16, "fp8": F16}
NUMPY = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), BF16: np.dtype(ml_dtypes.bfloat16)}
LEAST = np.float32(2.0**-24)  # of float16: a scale must not become 0
EARLY = ("timestep", "class_labels")  # what hangs on these alone is the time branch

BF16_OPSET = 22  # the first one whose convolutions take bfloat16; else it is as 21

PRODUCTS = frozenset({"Conv", "MatMul"})
# float32 always; as their operands are; moving values about
WIDE = frozenset(
    ("InstanceNormalization", "LayerNormalization", "Softmax", "Cos", "Sin", "Exp", "Sqrt")
)
PLAIN = frozenset(("Add", "Sub", "Mul", "Div", "Sigmoid", "Relu", "Gelu"))
LAYOUT = frozenset(("Reshape", "Transpose", "Concat", "Split", "Slice", "Unsqueeze", "Squeeze",
                    "Expand", "Gather", "Pad", "Resize", "MaxPool"))  # fmt: skip
QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Typed:
    """A typed graph whose weights are not bound to a file yet.

    wants   weight -> the types that its users take it in
    """

    model: ir.Model
    wants: Mapping[str, frozenset[ir.DataType]]


def typed(model: ir.Model, half: ir.DataType) -> Typed:
    """The graph with explicit types; weights become inputs `name@type` until `bound`.

    model       a portable graph, or its Q/DQ twin: all of its arithmetic is float32
    raises      TraceError: an operator that the table above lacks
    """
    held = {str(n): v.const_value for n, v in model.graph.initializers.items()}
    model = copy_of(model)  # which no longer knows in which folder its weights are
    _symmetric(model.graph)
    return _Typing(model, half, held).run()


def bound(made: Typed, stored: Mapping[str, Stored], *, location: str) -> ir.Model:
    """The typed graph with its weights in the file `location`; a `Cast` where that holds another
    type than the graph takes."""
    model = copy_of(made.model)
    graph = model.graph
    casts = []
    weights: dict[str, ir.Value] = {}
    for value in [v for v in graph.inputs if "@" in str(v.name)]:
        graph.inputs.remove(value)
        name = str(value.name).rpartition("@")[0]
        where, wanted = stored[_file_name(name)], value.dtype
        if name not in weights:
            weights[name] = _external(name, where, location)
            graph.register_initializer(weights[name])
        source = weights[name]
        if source.dtype == wanted:
            value.replace_all_uses_with(source)
            continue
        assert wanted is not None, "a weight has a type"
        cast = _cast(source, wanted, str(value.name))
        value.replace_all_uses_with(cast.outputs[0])
        casts.append(cast)
    graph.insert_before(graph[0], casts)
    return model


class _Typing:
    """One pass over a graph, in order of use: new nodes in the place of the old ones."""

    def __init__(
        self, model: ir.Model, half: ir.DataType, held: Mapping[str, ir.TensorProtocol | None]
    ) -> None:
        self.model, self.graph, self.half, self.held = model, model.graph, half, held
        self.old = list(model.graph)
        self.nodes: list[ir.Node] = []
        self.values: dict[ir.Value, ir.Value] = {}  # old -> new, of activations
        self.constant: dict[ir.Value, ir.Node | None] = {}  # old -> its node; None: an initializer
        self.made: dict[tuple[str, ir.DataType], ir.Value] = {}
        self.wants: dict[str, set[ir.DataType]] = {}
        self.forced = _time_branch(model.graph) | _scores(model.graph)

    def run(self) -> Typed:
        graph = self.graph
        outputs = list(graph.outputs)
        for value in graph.inputs:
            self.values[value] = value
        for value in graph.initializers.values():
            self.constant[value] = None
        for node in self.old:
            self.translate(node)
        finals = [self.output(value) for value in outputs]
        graph.outputs.clear()
        for node in reversed(self.old):
            graph.remove(node, safe=True)
        graph.extend(self.nodes)
        graph.outputs.extend(finals)
        weights = [v for (name, _), v in self.made.items() if name in self.wants]
        graph.inputs.extend(v for v in weights if "@" in str(v.name))
        drop_unused(graph)
        if self.half == BF16:
            graph.opset_imports[""] = BF16_OPSET
        return Typed(self.model, {n: frozenset(t) for n, t in self.wants.items()})

    def translate(self, node: ir.Node) -> None:
        inputs = [v for v in node.inputs if v is not None]
        op = node.op_type
        moves = op in LAYOUT or op in ("Cast", DEQUANTISE)
        if inputs and moves and all(v in self.constant for v in inputs):
            self.constant.update(dict.fromkeys(node.outputs, node))
            return
        if op == QUANTISE:
            self.emit(node, self.half, _steps_type(node))
        elif op == DEQUANTISE:
            self.emit(node, self.half)
        elif op == "Shape" or not any(self.is_float(v) for v in inputs):
            self.emit(node, None)
        elif op in WIDE or (node in self.forced and op not in PRODUCTS):
            self.emit(node, F32)
        elif op in PRODUCTS:
            self.emit(node, self.half)
        elif op in PLAIN or op in LAYOUT:
            self.emit(node, self.operands(node))
        else:
            raise TraceError(
                f"no rule for the precision of {op} ({node.name})",
                hint="say in export/graph/typed.py whether it may compute in half precision",
            )

    def operands(self, node: ir.Node) -> ir.DataType:
        """float32 when all activations are: what comes out of a norm stays wide up to a product.
        Of a table of embeddings rows are taken in half: it is the largest weight of a network."""
        if node.op_type == "Gather" and node.inputs[0] in self.constant:
            return self.half
        types = {self.values[v].dtype for v in node.inputs
                 if v is not None and v in self.values and self.is_float(v)}  # fmt: skip
        return self.half if self.half in types else F32

    def emit(
        self, node: ir.Node, wanted: ir.DataType | None, gives: ir.DataType | None = None
    ) -> None:
        """The node, its float inputs in this type; None: no float arithmetic in it."""
        # A Resize's factors are float32 whatever it resizes.
        only_first = node.op_type == "Resize"
        taken = [
            None if v is None else self.taken(v, F32 if i and only_first else wanted)
            for i, v in enumerate(node.inputs)
        ]
        given = gives if gives is not None else wanted
        outputs = []
        for old in node.outputs:
            dtype = given if given is not None else _integer_type(node, taken)
            new = ir.Value(name=old.name, shape=old.shape, type=ir.TensorType(dtype))
            self.values[old] = new
            outputs.append(new)
        attributes = [a for a in node.attributes.values() if isinstance(a, ir.Attr)]
        self.nodes.append(
            ir.Node("", node.op_type, taken, attributes, outputs=outputs, name=node.name)
        )

    def taken(self, value: ir.Value, wanted: ir.DataType | None) -> ir.Value:
        if value in self.constant:
            return self.fixed(value, wanted)
        new = self.values[value]
        if wanted is None or new.dtype not in FLOATS or new.dtype == wanted:
            return new
        return self.cast(new, wanted)

    def cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        key = str(value.name), wanted
        if key not in self.made:
            node = _cast(value, wanted, f"{value.name}@{wanted.name.lower()}")
            self.nodes.append(node)
            self.made[key] = node.outputs[0]
        return self.made[key]

    def fixed(self, value: ir.Value, wanted: ir.DataType | None) -> ir.Value:
        """A constant in this type: a weight, a number, or what is only moved of these."""
        node = self.constant[value]
        if node is None:
            return self.initializer(value, wanted)
        if node.op_type == "Cast":  # of a stored half type to float32: the user's type instead
            source = node.inputs[0]
            assert source is not None, "a Cast has an input"
            return self.fixed(source, wanted)
        key = str(value.name), F32 if wanted is None else wanted
        if key not in self.made:
            taken = [None if v is None else self.fixed(v, wanted) for v in node.inputs]
            dtype = key[1] if self.is_float(value) else _integer_type(node, taken)
            suffix = "" if dtype == F32 else f"@{dtype.name.lower()}"
            outputs = [
                ir.Value(name=f"{v.name}{suffix}", shape=v.shape, type=ir.TensorType(dtype))
                for v in node.outputs
            ]
            attributes = [a for a in node.attributes.values() if isinstance(a, ir.Attr)]
            self.nodes.append(
                ir.Node(
                    "",
                    node.op_type,
                    taken,
                    attributes,
                    outputs=outputs,
                    name=f"{node.name}{suffix}",
                )
            )
            for old, new in zip(node.outputs, outputs, strict=True):
                self.made[str(old.name), key[1]] = new
        return self.made[key]

    def initializer(self, value: ir.Value, wanted: ir.DataType | None) -> ir.Value:
        name = str(value.name)
        held = self.held.get(name, value.const_value)
        assert held is not None, f"{name}: an initializer holds a tensor"
        if held.dtype not in FLOATS:
            if isinstance(held, ir.ExternalTensor):
                return self.weight(name, held.dtype, held.shape)
            return value
        wanted = F32 if wanted is None else wanted
        # TensorRT takes a scale as a constant of the graph, in the type of what it scales.
        scale = any(user.op_type in (QUANTISE, DEQUANTISE) for user, _ in value.uses())
        if isinstance(held, ir.ExternalTensor) and not scale:
            return self.weight(name, wanted, held.shape)
        if wanted == F32 and not scale:
            return value
        key = name, wanted
        if key not in self.made:
            label = f"{name}@{wanted.name.lower()}"
            numbers = held.numpy().astype(np.float32)
            kept = np.maximum(numbers, LEAST) if scale else numbers
            tensor = ir.tensor(kept.astype(NUMPY[wanted]), name=label)
            new = ir.Value(
                name=label, shape=tensor.shape, type=ir.TensorType(wanted), const_value=tensor
            )
            self.graph.register_initializer(new)
            self.made[key] = new
        return self.made[key]

    def weight(self, name: str, wanted: ir.DataType, shape: ir.Shape) -> ir.Value:
        """Of a file: an input of the graph until `bound` gives it its place."""
        self.wants.setdefault(name, set()).add(wanted)
        key = name, wanted
        if key not in self.made:
            self.made[key] = ir.Value(
                name=f"{name}@{wanted.name.lower()}", shape=shape, type=ir.TensorType(wanted)
            )
        return self.made[key]

    def output(self, value: ir.Value) -> ir.Value:
        """An output of the graph, under its name and in its type."""
        new = self.values[value]
        wanted, name, shape = value.dtype, value.name, value.shape
        assert wanted is not None, "an output has a type"
        if new.dtype != wanted:
            new.name = f"{name}/half"
            node = _cast(new, wanted, f"{name}@{wanted.name.lower()}")
            self.nodes.append(node)
            new = node.outputs[0]
        new.name, new.shape, new.type = name, shape, ir.TensorType(wanted)
        return new

    def is_float(self, value: ir.Value) -> bool:
        if value in self.values:
            return self.values[value].dtype in FLOATS
        node = self.constant[value]
        if node is None:
            assert value.const_value is not None, "an initializer holds a tensor"
            return value.const_value.dtype in FLOATS
        if node.op_type in ("Cast", DEQUANTISE):
            return True
        first = node.inputs[0]
        assert first is not None, "what moves a value has one"
        return self.is_float(first)


def _symmetric(graph: ir.Graph) -> None:
    """Grids with a zero point become int8 about zero that reach as far: half as fine at worst."""
    for node in [n for n in graph if n.op_type in (QUANTISE, DEQUANTISE)]:
        scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        held = None if zero is None else zero.const_value
        if held is None or held.dtype != ir.DataType.UINT8:
            continue
        assert scale is not None, "a grid has a scale"
        assert scale.const_value is not None, "a scale is a constant"
        point = int(held.numpy())
        reach = max(point, 255 - point) * float(scale.const_value.numpy())
        for i, number in ((1, np.float32(reach / 127)), (2, np.int8(0))):
            name = f"{node.name}/symmetric_{i}"
            tensor = ir.tensor(np.asarray(number), name=name)
            value = ir.Value(
                name=name,
                shape=ir.Shape(()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            graph.register_initializer(value)
            node.replace_input_with(i, value)
        if node.op_type == QUANTISE:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT8)


def _time_branch(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that hang on the time and on constants alone."""
    return _reached(graph, [v for v in graph.inputs if v.name in EARLY], lambda n: True)


def _reached(
    graph: ir.Graph, begin: Collection[ir.Value], allowed: Callable[[ir.Node], bool]
) -> set[ir.Node]:
    fixed = set(graph.initializers.values())
    known = set(begin)
    nodes: set[ir.Node] = set()
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        if inputs and all(v in fixed for v in inputs):
            fixed.update(node.outputs)
        elif inputs and all(v in fixed or v in known for v in inputs) and allowed(node):
            known.update(node.outputs)
            nodes.add(node)
    return nodes


def _scores(graph: ir.Graph) -> set[ir.Node]:
    """What is done to an attention's scores between their product and the softmax."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type != "Softmax":
            continue
        before = _producer(node)
        while before is not None and before.op_type in PLAIN:
            found.add(before)
            before = _producer(before)
    return found


def _producer(node: ir.Node) -> ir.Node | None:
    value = node.inputs[0]
    return None if value is None else value.producer()


def _integer_type(node: ir.Node, taken: list[ir.Value | None]) -> ir.DataType:
    """Of a node without float arithmetic."""
    if node.op_type == "Shape":
        return ir.DataType.INT64
    types = [v.dtype for v in taken if v is not None and v.dtype is not None]
    return types[0] if types else ir.DataType.INT64


def _steps_type(node: ir.Node) -> ir.DataType:
    """What a QuantizeLinear gives: its zero point says so."""
    zero = node.inputs[2]
    assert zero is not None, "a grid of ours has a zero point"
    assert zero.const_value is not None, "a zero point is a constant"
    return zero.const_value.dtype


def _file_name(name: str) -> str:
    """graph/quantize.py calls the 8-bit values of a weight `name/int8`; the file has its name."""
    for steps in QUANTISED.values():
        name = name.removesuffix(f"/{steps.name}")
    return name


def _cast(value: ir.Value, wanted: ir.DataType, name: str) -> ir.Node:
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted))
    return ir.node("Cast", [value], {"to": int(wanted)}, outputs=[result], name=name)


def _external(name: str, where: Stored, location: str) -> ir.Value:
    dtype = TYPES[where.dtype]
    tensor = ir.ExternalTensor(
        location, where.offset, where.nbytes, dtype, shape=ir.Shape(where.shape), name=name
    )
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
