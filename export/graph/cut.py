"""Cutting: a network that hands out its deep features, and the shallow rest that takes them back.

`deep` is the full graph with one output more for each cut. `shallow<k>` is the full graph in which
an input stands in the place of that value: what led up to it, most of the network, is dropped. The
numbers change nowhere: the same nodes run on the same values.

source      Ma et al. 2023, DeepCache, arXiv:2312.00858, section 3.2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ...engine.errors import TraceError
from ...engine.spec import TensorSpec, cut_of
from .tidy import drop_unused
from .tools import copy_of


def cut(model: ir.Model, features: Sequence[TensorSpec]) -> Mapping[str, ir.Model]:
    """`deep`, and `shallow<k>` for each of `features<k>`; nothing when there are none.

    features    what meets skip k on its way up, counted from the outermost skip
    raises      TraceError when the network has no such skip
    """
    if not features:
        return {}
    deep = copy_of(model)
    for tensor in features:
        value = _meets(deep.graph, tensor)
        _describe(value, tensor)
        deep.graph.outputs.append(value)
    return {"deep": deep, **{f"shallow{cut_of(t.name)}": _shallow(model, t) for t in features}}


def _shallow(model: ir.Model, tensor: TensorSpec) -> ir.Model:
    shallow = copy_of(model)
    graph = shallow.graph
    value, replacement = _meets(graph, tensor), ir.Value(name=tensor.name)
    _describe(replacement, tensor)
    value.replace_all_uses_with(replacement)
    graph.inputs.append(replacement)
    drop_unused(graph)
    for given in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(given)
    return shallow


def _meets(graph: ir.Graph, tensor: TensorSpec) -> ir.Value:
    """The value that is joined with skip k: each skip has one join along the channels, and the
    outermost skip has the last one."""
    joins = [n for n in graph if n.op_type == "Concat" and n.attributes["axis"].as_int() == 1]
    number = cut_of(tensor.name)
    if number >= len(joins):
        raise TraceError(
            f"{graph.name} has {len(joins)} skips; {tensor.name} needs number {number}",
            hint="the cuts of export/components.py are not those of this network",
        )
    value = joins[-1 - number].inputs[0]
    assert value is not None, "a Concat has inputs"
    return value


def _describe(value: ir.Value, tensor: TensorSpec) -> None:
    value.name = tensor.name
    value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(ir.DataType.FLOAT)
