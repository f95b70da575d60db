"""Convolutions behind an upsampling by two, as four of the map before it, in an 8-bit twin.

backends/openvino_upsampling.py says how and why; it does the same for layers in float when they
are compiled. Weights in 8 bits cannot be summed without being rounded once more, so that the twin
has the sums instead: `<weight>/<row><column>`, rounded once.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...backends.openvino_upsampling import PLACES, kernel
from ...engine.ports import Floats
from .tidy import drop_unused
from .tools import copy_of


@dataclass(frozen=True)
class Part:
    """One of the four: of which layer and weight, and a result's (row, column) in its square."""

    layer: str
    weight: str
    place: tuple[int, int]

    def of(self, weight: Floats) -> Floats:
        """[O, I, 2, 2], of [O, I, 3, 3]."""
        return kernel(weight, self.place)


def on_small_maps(model: ir.Model, chosen: Collection[str]) -> tuple[ir.Model, dict[str, Part]]:
    """The graph with those of the chosen layers that can be rewritten, and layer -> its part.

    The new layers' weights are named, not there: `quantized` binds all to a file.
    """
    model = copy_of(model)
    parts: dict[str, Part] = {}
    for node in [n for n in model.graph if n.op_type == "Conv" and n.name in chosen]:
        small, weight = _before(node), _weight(node)
        if small is not None and weight is not None:
            parts |= _split(model.graph, node, small, weight)
    drop_unused(model.graph)
    return model, parts


def part_name(name: str, place: tuple[int, int]) -> str:
    return f"{name}/{place[0]}{place[1]}"


def _before(conv: ir.Node) -> ir.Value | None:
    """The map before an upsampling by two, where this convolution alone uses what comes of it."""
    large = conv.inputs[0]
    resize = None if large is None else large.producer()
    if large is None or resize is None or resize.op_type != "Resize" or len(large.uses()) != 1:
        return None
    scales = resize.inputs[2].const_value if resize.inputs[2] is not None else None
    way = [resize.attributes.get_string(k, "") for k in
           ("mode", "coordinate_transformation_mode", "nearest_mode")]  # fmt: skip
    if scales is None or not np.array_equal(scales.numpy(), [1, 1, 2, 2]):
        return None
    if any(list(conv.attributes.get_ints(k, [1, 1])) != [1, 1] for k in ("strides", "dilations")):
        return None
    if list(conv.attributes.get_ints("pads", [0, 0, 0, 0])) != [1, 1, 1, 1]:
        return None
    nearest = way == ["nearest", "asymmetric", "floor"]
    return resize.inputs[0] if nearest and conv.attributes.get_int("group", 1) == 1 else None


def _weight(conv: ir.Node) -> ir.Value | None:
    """The 3x3 weight of the component's file, behind a Cast or not."""
    value = conv.inputs[1]
    while value is not None and (cast := value.producer()) is not None and cast.op_type == "Cast":
        value = cast.inputs[0]
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        return None
    return value if list(value.const_value.shape)[2:] == [3, 3] else None


def _split(graph: ir.Graph, conv: ir.Node, small: ir.Value, weight: ir.Value) -> dict[str, Part]:
    stored = weight.const_value
    assert isinstance(stored, ir.ExternalTensor), "_weight has seen it"
    shape = ir.Shape([*list(stored.shape)[:2], 2, 2])
    made, results, parts = [], [], {}
    for a, b in PLACES:
        sums = ir.Value(name=part_name(str(weight.name), (a, b)))
        sums.shape, sums.type = shape, ir.TensorType(ir.DataType.FLOAT)
        sums.const_value = ir.ExternalTensor(
            stored.location, 0, 0, ir.DataType.FLOAT, shape=shape, name=str(sums.name)
        )
        graph.register_initializer(sums)
        name = part_name(str(conv.name), (a, b))
        result = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        given = {"kernel_shape": [2, 2], "pads": [1 - a, 1 - b, a, b], "strides": [1, 1]}
        made.append(ir.node("Conv", [small, sums, *conv.inputs[2:]], given,
                            outputs=[result], name=name))  # fmt: skip
        results.append(result)
        parts[name] = Part(str(conv.name), str(weight.name), (a, b))
    joined = ir.Value(name=f"{conv.name}/places", type=ir.TensorType(ir.DataType.FLOAT))
    old = conv.outputs[0]
    large = ir.Value(name=old.name, shape=old.shape, type=ir.TensorType(ir.DataType.FLOAT))
    old.name = f"{conv.name}/dropped"
    made.append(ir.node("Concat", results, {"axis": 1}, outputs=[joined], name=str(joined.name)))
    # DCR: channels come place by place, rows of a square before columns
    made.append(ir.node("DepthToSpace", [joined], {"blocksize": 2, "mode": "DCR"},
                        outputs=[large], name=f"{conv.name}/large"))  # fmt: skip
    graph.insert_before(conv, made)
    old.replace_all_uses_with(large, replace_graph_outputs=True)
    return parts
