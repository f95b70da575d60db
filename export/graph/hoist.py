"""Hoisting: what depends on the text alone leaves the step graph and is computed once a prompt.

In a UNet that is the keys and values of every cross-attention. The cut is made at the results of
their linear layers, [B, 77, C]: the reshapes behind them stay with the attention, whose pattern the
engines look for, and move no numbers. Exact: the same nodes run on the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ...engine.errors import TraceError
from .tidy import drop_unused
from .tools import copy_of

# Operators that only rearrange: not worth a cut behind them.
LAYOUT = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Split:
    """`prologue` gives, under their own names, further inputs of `rest`."""

    prologue: ir.Model
    rest: ir.Model


def hoist(model: ir.Model, inputs: Iterable[str]) -> Split | None:
    """Split off what depends on these inputs alone; None when nothing does.

    raises      TraceError when the shape of a value at the cut cannot be told
    """
    early = set(inputs)
    rest = copy_of(model)
    found = _hoistable(rest.graph, early)
    cut = [v for node in found for v in node.outputs if _leaves(v, found)]
    if not cut:
        return None
    prologue = _prologue(rest, [str(v.name) for v in cut], early)
    _replace_by_inputs(rest.graph, cut, prologue.graph.outputs, early)
    return Split(prologue, rest)


def _hoistable(graph: ir.Graph, early: set[str]) -> list[ir.Node]:
    """Arithmetic on the early inputs and constants alone, with all that leads up to it."""
    fixed = set(graph.initializers.values())
    known = {v for v in graph.inputs if v.name in early}
    nodes: list[ir.Node] = []
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        if inputs and all(v in fixed for v in inputs):
            fixed.update(node.outputs)
        elif all(v in fixed or v in known for v in inputs) and inputs:
            known.update(node.outputs)
            nodes.append(node)
    needed: set[ir.Node] = set()
    for node in reversed(nodes):
        arithmetic = node.op_type not in LAYOUT
        if arithmetic or any(user in needed for v in node.outputs for user, _ in v.uses()):
            needed.add(node)
    return [n for n in nodes if n in needed]


def _leaves(value: ir.Value, nodes: list[ir.Node]) -> bool:
    return any(user not in nodes for user, _ in value.uses())


def _prologue(model: ir.Model, names: list[str], early: set[str]) -> ir.Model:
    prologue = copy_of(model)
    graph = prologue.graph
    values = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.clear()
    graph.outputs.extend(values[n] for n in names)
    drop_unused(graph)
    for value in [v for v in graph.inputs if v.name not in early]:
        graph.inputs.remove(value)
    graph.name = f"{graph.name}_prologue"
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(prologue))
    known = {v.name: v for v in ir.from_proto(inferred).graph.outputs}
    for value in graph.outputs:
        value.shape, value.type = known[value.name].shape, known[value.name].type
        if value.shape is None or any(d is None for d in value.shape):
            raise TraceError(
                f"{value.name}, where the graph is cut, has no known shape",
                hint="the operators before it are beyond ONNX shape inference; see graph/hoist.py",
            )
    return prologue


def _replace_by_inputs(
    graph: ir.Graph, cut: list[ir.Value], like: Sequence[ir.Value], early: set[str]
) -> None:
    for value, known in zip(cut, like, strict=True):
        value.name = f"{known.name}/hoisted"
        replacement = ir.Value(name=known.name, shape=known.shape, type=known.type)
        value.replace_all_uses_with(replacement)
        graph.inputs.append(replacement)
    drop_unused(graph)
    for value in [v for v in graph.inputs if v.name in early and not v.uses()]:
        graph.inputs.remove(value)
