"""Clean up: what is computed twice is computed once, and what nobody uses is dropped.

Exact: no arithmetic is added, reordered or folded.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from .tools import copy_of


def tidy(model: ir.Model) -> ir.Model:
    """Same inputs, same outputs, fewer nodes."""
    model = copy_of(model)
    _merge_equal(model.graph)
    drop_unused(model.graph)
    return model


def _merge_equal(graph: ir.Graph) -> None:
    """One node for all that do the same to the same values; nodes are in order of use."""
    first: dict[Hashable, ir.Node] = {}
    outputs = set(graph.outputs)
    for node in list(graph):
        key = (node.domain, node.op_type, tuple(node.inputs), _attributes(node), len(node.outputs))
        kept = first.setdefault(key, node)
        if kept is node or any(v in outputs for v in node.outputs):
            continue
        for old, new in zip(node.outputs, kept.outputs, strict=True):
            old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def _attributes(node: ir.Node) -> Hashable:
    return tuple(sorted((a.name, repr(a.value)) for a in node.attributes.values()))


def drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that no output depends on."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(v.uses() or v in outputs for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
