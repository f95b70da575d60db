"""ATen to ONNX, opset 21: one small function for each operator that our networks use.

torch's own ONNX exporter was tried first. It decomposes before it translates (group norms into
Reshape, InstanceNormalization, Range and Expand; chunks into sequences; attention's products into
Expand and bmm), takes three times as long, and its output changes with every release. A table of
some twenty lines of meaning gives the graph that the engines' pattern matchers look for.

source      ONNX operator specifications, opset 21
checked by  tests/parity/test_lowering.py (against torch, through ONNX Runtime)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx

from ..engine.errors import TraceError

OPSET = 21
FULL_SLICE = 2**63 - 1
WHOLE = "network."  # a band's path to the network that it is cut from

Scalar = int | float
Size = int | ir.Value  # a dimension: known, or an int64 [1] in the graph


class Lowering:
    """Nodes of one ONNX graph, in the making.

    env         what each node of the traced graph became: a Value, a number, or a list of them
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self.env: dict[fx.Node, Any] = {}
        self._scope = ""
        self._taken: set[str] = set()

    def run(self, node: fx.Node) -> None:
        """Translate one call; its result goes into `env`."""
        self._scope = module_path(node)
        self.env[node] = TABLE[node.target](self, node)

    def value(self, arg: Any) -> Any:
        """What an argument of a traced call is here."""
        if isinstance(arg, fx.Node):
            return self.env[arg]
        return [self.value(a) for a in arg] if isinstance(arg, list | tuple) else arg

    def constant(self, array: NDArray[Any], label: str) -> ir.Value:
        """An initializer of this content; the same content twice is the same initializer."""
        key = f"{array.dtype}{list(array.shape)}{array.tobytes().hex()}"
        if key not in self.constants:
            name = self.unique(f"constant.{label}")
            tensor = ir.tensor(array, name=name)
            self.constants[key] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        return self.constants[key]

    def ints(self, *values: int) -> ir.Value:
        label = "_".join(str(v).replace("-", "m") for v in values)
        return self.constant(np.array(values, np.int64), label)

    def emit(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Append a node with one result, and return that."""
        return self.emit_parts(1, op, inputs, **attributes)[0]

    def emit_parts(
        self, parts: int, op: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> list[ir.Value]:
        """Append a node with several results. All are named after the module; see finish_names."""
        stem = self.unique(f"{self._scope}/{op}" if self._scope else op)
        names = [stem] if parts == 1 else [f"{stem}.{i}" for i in range(parts)]
        values = [ir.Value(name=n) for n in names]
        self.nodes.append(ir.node(op, inputs, attributes, outputs=values, name=stem))
        return values

    def unique(self, name: str) -> str:
        stem, n = name, 1
        while name in self._taken:
            n += 1
            name = f"{stem}_{n}"
        self._taken.add(name)
        return name

    def size(self, size: Size) -> ir.Value:
        return self.ints(size) if isinstance(size, int) else size

    def operand(self, x: Any) -> ir.Value:
        """A tensor operand of float arithmetic; Python numbers become float32 constants."""
        if isinstance(x, ir.Value):
            return x
        return self.constant(np.array(x, np.float32), repr(float(x)).replace("-", "m"))

    def reshape(
        self, x: ir.Value, before: torch.Size, after: torch.Size, sizes: list[Size]
    ) -> ir.Value:
        """`sizes` may hold at most one -1. Prefers a constant target, which every engine folds."""
        plain: list[int] = []
        for i, size in enumerate(sizes):
            kept = i < len(before) and before[i] == after[i]
            plain.append(size if isinstance(size, int) else 0 if kept else -1)
        if plain.count(-1) <= 1:
            return self.emit("Reshape", [x, self.ints(*plain)])
        target = self.emit("Concat", [self.size(s) for s in sizes], axis=0)
        return self.emit("Reshape", [x, target])


def module_path(node: fx.Node) -> str:
    """`input_blocks.1.0.in_layers.2`: the innermost module that the call stands in."""
    stack = node.meta.get("nn_module_stack") or {}
    path: str = list(stack.values())[-1][0] if stack else ""
    path = path.removeprefix(WHOLE)
    return "" if path.startswith("_") else path  # torch's own placeholder for "no module"


def shape_of(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


Rule = Callable[[Lowering, fx.Node], Any]
TABLE: dict[Any, Rule] = {}
aten = torch.ops.aten


def lowers(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        TABLE.update(dict.fromkeys(targets, rule))
        return rule

    return register


def check_known(graph: fx.Graph) -> None:
    """Raises TraceError with every operator that the table lacks."""
    calls = {n.target for n in graph.nodes if n.op == "call_function"}
    if unknown := sorted(str(t) for t in calls if t not in TABLE):
        raise TraceError(
            f"no ONNX form is known for {', '.join(unknown)}",
            hint="write the module with operators that export/lowering.py has, "
            "or add the operator there",
        )


# Shapes


@lowers(aten.sym_size.int)
def _size(g: Lowering, node: fx.Node) -> Size:
    x, axis = node.args
    value = node.meta["val"]
    if isinstance(value, int):
        return value
    assert isinstance(axis, int), f"{node}: a dimension is a number"
    return g.emit("Shape", [g.value(x)], start=axis, end=axis + 1)


def _integer(op: str, rule: Callable[[int, int], int]) -> Rule:
    def lower(g: Lowering, node: fx.Node) -> Size:
        a, b = g.value(node.args)
        if isinstance(a, int) and isinstance(b, int):
            return rule(a, b)
        return g.emit(op, [g.size(a), g.size(b)])

    return lower


TABLE[operator.add] = _integer("Add", operator.add)
TABLE[operator.sub] = _integer("Sub", operator.sub)
TABLE[operator.mul] = _integer("Mul", operator.mul)
TABLE[operator.floordiv] = _integer("Div", operator.floordiv)  # sizes are positive


@lowers(aten.reshape.default, aten.view.default)
def _reshape(g: Lowering, node: fx.Node) -> ir.Value:
    x, sizes = node.args
    return g.reshape(g.value(x), shape_of(x), shape_of(node), g.value(sizes))


@lowers(aten.flatten.using_ints)
def _flatten(g: Lowering, node: fx.Node) -> ir.Value:
    x, before, after = node.args[0], shape_of(node.args[0]), shape_of(node)
    first = node.args[1] if len(node.args) > 1 else 0
    sizes: list[Size] = [s if isinstance(s, int) else -1 for s in after]
    for i in range(int(str(first))):
        sizes[i] = 0
    return g.reshape(g.value(x), before, after, sizes)


@lowers(aten.unsqueeze.default)
def _unsqueeze(g: Lowering, node: fx.Node) -> ir.Value:
    x, axis = g.value(node.args)
    return g.emit("Unsqueeze", [x, g.ints(axis)])


@lowers(aten.transpose.int)
def _transpose(g: Lowering, node: fx.Node) -> ir.Value:
    x, a, b = g.value(node.args)
    perm = list(range(len(shape_of(node))))
    perm[a], perm[b] = perm[b], perm[a]
    return g.emit("Transpose", [x], perm=perm)


@lowers(aten.slice.Tensor)
def _slice(g: Lowering, node: fx.Node) -> ir.Value:
    x: ir.Value
    x, axis, start, end = g.value(node.args)
    if start == 0 and end == FULL_SLICE:
        return x
    return g.emit("Slice", [x, g.ints(start), g.ints(end), g.ints(axis)])


@lowers(aten.cat.default)
def _cat(g: Lowering, node: fx.Node) -> ir.Value:
    tensors, axis = [*g.value(node.args), 0][:2]
    return g.emit("Concat", tensors, axis=axis)


@lowers(aten.chunk.default)
def _chunk(g: Lowering, node: fx.Node) -> list[ir.Value]:
    x, chunks, axis = [*g.value(node.args), 0][:3]
    width = shape_of(node.args[0])[axis]
    assert isinstance(width, int), f"{node}: a fixed size"
    assert width % chunks == 0, f"{node}: parts of one size"
    return g.emit_parts(chunks, "Split", [x], axis=axis, num_outputs=chunks)


@lowers(operator.getitem)
def _getitem(g: Lowering, node: fx.Node) -> Any:
    parts, index = g.value(node.args)
    return parts[index]


@lowers(aten.pad.default)
def _pad(g: Lowering, node: fx.Node) -> ir.Value:
    x, amounts = g.value(node.args[:2])
    assert len(node.args) < 3 or node.args[2] == "constant", f"{node}: zeros only"
    rank = len(shape_of(node))
    # torch: (left, right) of the last axis first; ONNX: all begins, then all ends
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs[::-1]
    return g.emit("Pad", [x, g.ints(*(b for b, _ in pairs), *(e for _, e in pairs))])


@lowers(aten.upsample_nearest2d.vec)
def _upsample(g: Lowering, node: fx.Node) -> ir.Value:
    x, _, factors = g.value(node.args)
    scales = g.constant(np.array([1, 1, *factors], np.float32), "scales")
    return g.emit(
        "Resize",
        [x, None, scales],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


@lowers(aten.upsample_bilinear2d.vec)
def _bilinear(g: Lowering, node: fx.Node) -> ir.Value:
    x, sizes, corners, factors = g.value(node.args)
    mode = {"coordinate_transformation_mode": "align_corners" if corners else "pytorch_half_pixel"}
    if sizes is None:
        scales = g.constant(np.array([1, 1, *factors], np.float32), "scales")
        return g.emit("Resize", [x, None, scales], mode="linear", **mode)
    known = shape_of(node.args[0])[:2]
    assert all(isinstance(n, int) for n in known), f"{node}: pictures and channels of fixed number"
    target = g.emit("Concat", [g.ints(*known), *(g.size(s) for s in sizes)], axis=0)
    return g.emit("Resize", [x, None, None, target], mode="linear", **mode)


@lowers(aten.expand.default)
def _expand(g: Lowering, node: fx.Node) -> ir.Value:
    x, sizes = g.value(node.args)
    # A 1 keeps what is there, as -1 does in torch.
    target = g.emit("Concat", [g.size(1 if s == -1 else s) for s in sizes], axis=0)
    return g.emit("Expand", [x, target])


@lowers(aten.squeeze.dim)
def _squeeze(g: Lowering, node: fx.Node) -> ir.Value:
    x, axis = g.value(node.args)
    return g.emit("Squeeze", [x, g.ints(axis)])


@lowers(aten.max_pool2d.default)
def _max_pool(g: Lowering, node: fx.Node) -> ir.Value:
    assert len(node.args) == 3, f"{node}: no padding, no dilation"
    x, kernel, stride = g.value(node.args)
    return g.emit("MaxPool", [x], kernel_shape=kernel, strides=stride)


# Arithmetic


def _binary(op: str) -> Rule:
    def lower(g: Lowering, node: fx.Node) -> ir.Value:
        assert not node.kwargs, f"{node}: no alpha, no rounding mode"
        a, b = (g.operand(x) for x in g.value(node.args))
        return g.emit(op, [a, b])

    return lower


def _unary(op: str) -> Rule:
    return lambda g, node: g.emit(op, [g.value(node.args[0])])


TABLE[aten.add.Tensor] = _binary("Add")
TABLE[aten.sub.Tensor] = _binary("Sub")
TABLE[aten.mul.Tensor] = _binary("Mul")
TABLE[aten.div.Tensor] = _binary("Div")
TABLE[aten.matmul.default] = _binary("MatMul")
TABLE[aten.cos.default] = _unary("Cos")
TABLE[aten.sin.default] = _unary("Sin")
TABLE[aten.exp.default] = _unary("Exp")
TABLE[aten.relu.default] = _unary("Relu")
TABLE[aten.sqrt.default] = _unary("Sqrt")
TABLE[aten.sigmoid.default] = _unary("Sigmoid")


@lowers(aten.silu.default)
def _silu(g: Lowering, node: fx.Node) -> ir.Value:
    x = g.value(node.args[0])
    return g.emit("Mul", [x, g.emit("Sigmoid", [x])])


@lowers(aten.gelu.default)
def _gelu(g: Lowering, node: fx.Node) -> ir.Value:
    return g.emit(
        "Gelu", [g.value(node.args[0])], approximate=node.kwargs.get("approximate", "none")
    )


@lowers(aten.softmax.int)
def _softmax(g: Lowering, node: fx.Node) -> ir.Value:
    x, axis = g.value(node.args[:2])
    return g.emit("Softmax", [x], axis=axis)


# Layers


@lowers(aten.linear.default)
def _linear(g: Lowering, node: fx.Node) -> ir.Value:
    x, weight, bias = [*g.value(node.args), None][:3]
    # The file keeps [out, in]; engines fold the transposition of a constant when they compile.
    y = g.emit("MatMul", [x, g.emit("Transpose", [weight], perm=[1, 0])])
    return y if bias is None else g.emit("Add", [y, bias])


@lowers(aten.conv2d.default)
def _conv2d(g: Lowering, node: fx.Node) -> ir.Value:
    defaults = [None, [1, 1], [0, 0], [1, 1], 1]
    args = g.value(node.args)
    x, weight, bias, stride, padding, dilation, groups = args + defaults[len(args) - 2 :]
    return g.emit(
        "Conv",
        [x, weight, bias],
        kernel_shape=[int(s) for s in shape_of(node.args[1])[2:]],
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=groups,
    )


@lowers(aten.group_norm.default)
def _group_norm(g: Lowering, node: fx.Node) -> ir.Value:
    """Groups as channels of an instance norm.

    ONNX has GroupNormalization, but ONNX Runtime has no kernel for it on the processor and expands
    it into some twenty nodes (measured: 7.7 ms against 3.5 ms at 2x320x64x64). OpenVINO makes the
    same node of either form.
    """
    x, groups, weight, bias, eps = g.value(node.args[:5])
    ones = g.constant(np.ones(groups, np.float32), f"ones_{groups}")
    zeros = g.constant(np.zeros(groups, np.float32), f"zeros_{groups}")
    grouped = g.emit("Reshape", [x, g.ints(0, groups, -1)])
    normal = g.emit("InstanceNormalization", [grouped, ones, zeros], epsilon=eps)
    y = g.emit("Reshape", [normal, g.emit("Shape", [x])])
    axes = g.ints(*range(1, len(shape_of(node)) - 1))
    scaled = g.emit("Mul", [y, g.emit("Unsqueeze", [weight, axes])])
    return g.emit("Add", [scaled, g.emit("Unsqueeze", [bias, axes])])


@lowers(aten.layer_norm.default)
def _layer_norm(g: Lowering, node: fx.Node) -> ir.Value:
    x, normalized, weight, bias, eps = _layer_norm_args(g, node)
    if weight is None:
        (width,) = normalized
        weight = g.constant(np.ones(width, np.float32), f"ones_{width}")
        # Optional to ONNX; ONNX Runtime 1.32 crashed on a graph without it.
        bias = g.constant(np.zeros(width, np.float32), f"zeros_{width}")
    return g.emit("LayerNormalization", [x, weight, bias], axis=-len(normalized), epsilon=eps)


def _layer_norm_args(g: Lowering, node: fx.Node) -> list[Any]:
    """torch leaves arguments away at the end that have their default value."""
    args = g.value(node.args[:5])
    return [*args, *[None, None, 1e-5][len(args) - 2 :]]


@lowers(aten.embedding.default)
def _embedding(g: Lowering, node: fx.Node) -> ir.Value:
    weight, ids = g.value(node.args[:2])
    return g.emit("Gather", [weight, ids], axis=0)


def finish_names(nodes: Sequence[ir.Node]) -> None:
    """Name the result of each module's last operator after the module alone."""
    last: dict[str, ir.Node] = {}
    for node in nodes:
        scope, slash, _ = str(node.name).rpartition("/")
        if slash and node.op_type != "Shape":
            last[scope] = node
    for scope, node in last.items():
        if len(node.outputs) == 1:
            node.outputs[0].name = scope
