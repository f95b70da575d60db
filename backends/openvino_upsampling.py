"""A convolution of a map that was made twice as large, computed on the small map, for OpenVINO.

Of nearest neighbours each stands four times in the large map, so that a 3x3 kernel meets only 2x2
different ones, in four ways: one for each place of a result in its square of four. Each way is a
convolution of the small map with a 2x2 kernel, sums of the weights that meet the same neighbour;
the four results are put next to each other. That is 16 products where there were 36.

checked by  tests/unit/test_openvino_upsampling.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.ports import Floats
from .openvino_nodes import biased, floats, only_user, rounded

# What may stand between the enlarging and the convolution: what rounds to 8 bits and back.
ROUNDING = {"Convert", "FakeQuantize", "Multiply", "Subtract"}
# The rows (or columns) of a 3x3 kernel that meet the first and the second of two neighbours.
MEETS = {0: ((0,), (1, 2)), 1: ((0, 1), (2,))}
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # a result's (row, column) in its square
STEPS = 127  # int8 weights lie in -127 to 127
RECIPE = "upsampling convolutions on the small map: 1"


@dataclass(frozen=True)
class _Found:
    """enlarged    the node that enlarges the map [B, C, h, w]
    user        whose first input that is: the convolution, or the first of ROUNDING before it
    conv, end   the convolution, and the sum with its bias where there is one
    bias        [1, O, 1, 1], or None
    weight      [O, I, 3, 3]
    rounded     whether the weight lies in int8
    """

    enlarged: Any
    user: Any
    conv: Any
    end: Any
    bias: Floats | None
    weight: Floats
    rounded: bool


def convolve_before(model: Any) -> int:
    """Rewrite the 3x3 convolutions of doubled maps of an openvino.Model.

    Weights in int8 are summed and rounded anew, with a scale for each of the four kernels.

    model       what has free dimensions in it is left as it is
    returns     how many were rewritten
    """
    all_found = [f for node in model.get_ordered_ops() if (f := _found(node)) is not None]
    for found in all_found:
        found.user.input(0).replace_source_output(found.enlarged.input_value(0))
        made = _placed(found)
        made.set_friendly_name(found.end.get_friendly_name())
        for target in found.end.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
    if all_found:
        model.validate_nodes_and_infer_types()
    return len(all_found)


def kernel(weight: Floats, place: tuple[int, int]) -> Floats:
    """[O, I, 2, 2] for results at a place, of a kernel [O, I, 3, 3]."""
    down, along = (MEETS[i] for i in place)
    rows = [np.stack([weight[:, :, i][..., j].sum((2, 3)) for j in along], -1) for i in down]
    return np.stack(rows, -2)


def _found(enlarged: Any) -> _Found | None:
    if enlarged.get_type_name() != "Interpolate" or not _doubles(enlarged):
        return None
    user = node = only_user(enlarged)
    while node is not None and node.get_type_name() in ROUNDING:
        if any(_spreads(value) for value in node.input_values()[1:]):
            return None
        node = only_user(node)
    if node is None or node.get_type_name() != "Convolution" or not _three_by_three(node):
        return None
    if (weight := floats(node.input_value(1))) is None:
        return None
    whole = rounded(node.input_value(1)) is not None
    return _Found(enlarged, user, node, *biased(node), weight, whole)


def _doubles(node: Any) -> bool:
    """Nearest neighbours of a map of a fixed shape, each next to its copy."""
    attributes = node.get_attributes()
    value, out = node.input_value(0), node.output(0)
    if any(port.get_partial_shape().is_dynamic for port in (value, out)):
        return False
    way = [attributes[k] for k in ("mode", "coordinate_transformation_mode", "nearest_mode")]
    height, width = value.get_shape()[2:]
    doubled = [*value.get_shape()[:2], 2 * height, 2 * width]
    return way == ["nearest", "asymmetric", "floor"] and list(out.get_shape()) == doubled


def _spreads(value: Any) -> bool:
    """Whether a second operand differs from cell to cell, as far as shapes tell."""
    if value.get_partial_shape().is_dynamic:
        return True
    shape = list(value.get_shape())
    return len(shape) > 1 and any(n != 1 for n in shape[-2:])


def _three_by_three(conv: Any) -> bool:
    attributes = conv.get_attributes()
    plain = ("strides", "dilations", "pads_begin", "pads_end")
    ones = all(list(attributes[name]) == [1, 1] for name in plain)
    return ones and list(conv.input_value(1).get_shape())[2:] == [3, 3]


def _placed(found: _Found) -> Any:
    """The four convolutions of the small map, and their results in a large one."""
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    small, made = found.conv.input_value(0), []
    for a, b in PLACES:
        sums = kernel(found.weight, (a, b))
        weight = _rounded(ops, sums) if found.rounded else ops.constant(sums)
        one = ops.convolution(small, weight, [1, 1], [1 - a, 1 - b], [a, b], [1, 1])
        made.append(one if found.bias is None else ops.add(one, found.bias))
    return ops.depth_to_space(ops.concat(made, 1), "blocks_first", 2)


def _rounded(ops: Any, weight: Floats) -> Any:
    """A kernel in int8, times the scale of each of its outputs."""
    scale = np.maximum(np.abs(weight).max((1, 2, 3), keepdims=True), np.finfo(np.float32).tiny)
    scale = (scale / STEPS).astype(np.float32)
    whole = ops.convert(ops.constant(np.round(weight / scale).astype(np.int8)), "f32")
    return ops.multiply(whole, ops.constant(scale))
