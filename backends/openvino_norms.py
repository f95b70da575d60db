"""Group norms of maps whose channels lie last, for OpenVINO on the processor.

Convolutions compute with channels last, and OpenVINO's norm wants them first: two turns of the map
for each norm, and a result rounded to bfloat16 before it is scaled. Here a norm is two sums of each
channel, for which it does not matter how the map lies, and one product and sum on the map itself.

checked by  tests/unit/test_openvino_layout.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .openvino_nodes import constant, only_user

CELLS = np.array([2, 3])  # the axes of [B, C, H, W] that a channel's mean is taken over


def channels_last_norms(model: Any) -> list[Any]:
    """Rewrite the group norms of an openvino.Model.

    model       what has free dimensions in it is left as it is
    returns     the nodes made; they are to be computed in float32
    """
    made: list[Any] = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MVN" or (found := _group_norm(node)) is None:
            continue
        value, end = found
        nodes = _norm(value, node.get_output_shape(0)[1], node.get_attributes()["eps"])
        nodes[-1].set_friendly_name(end.get_friendly_name())
        for target in end.output(0).get_target_inputs():
            target.replace_source_output(nodes[-1].output(0))
        made += nodes
    return made


def _group_norm(norm: Any) -> tuple[Any, Any] | None:
    """(the map [B, C, H, W], the node that gives it normed), of a norm without weights."""
    before, node = norm.input_value(0).get_node(), norm
    for kind, neutral in (("Multiply", 1), ("Add", 0)):
        node = only_user(node)
        if node is None or node.get_type_name() != kind:
            return None
        if not _everywhere(node.input_value(1), neutral):
            return None
    end = only_user(node)
    if end is None or {before.get_type_name(), end.get_type_name()} != {"Reshape"}:
        return None
    value = before.input_value(0)
    if any(v.get_partial_shape().is_dynamic for v in (value, norm.output(0), end.output(0))):
        return None
    if len(value.get_shape()) != 4 or value.get_shape() != end.get_output_shape(0):
        return None
    return value, end


def _everywhere(value: Any, number: float) -> bool:
    """Whether a constant, changed in shape and type or not, is this number everywhere."""
    numbers = constant(value)
    return numbers is not None and bool((numbers == number).all())


def _norm(value: Any, groups: int, epsilon: float) -> list[Any]:
    """(x - mean) / sqrt(variance + epsilon) in all its nodes, the last one being the result.

    The variance is the mean square less the square of the mean, in float32: of a group whose mean
    is 30 times its deviation it is right to 1e-4, far below what bfloat16 rounds. Of a group that
    is nearly constant rounding can leave it below zero, where its root would be NaN.
    """
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    batch, channels, height, width = value.get_shape()
    members = channels // groups
    made: list[Any] = []

    def add(node: Any) -> Any:
        made.append(node)
        return node

    def shaped(node: Any, *shape: int) -> Any:
        return add(ops.reshape(node, np.array(shape), special_zero=False))

    def grouped(node: Any) -> Any:
        return add(ops.reduce_mean(shaped(node, batch, groups, members), np.array([2]), True))

    def spread(node: Any, factor: float) -> Any:
        # One constant: two products with one each become another product, which is not marked.
        alike = np.full((1, 1, members), factor, np.float32)
        return shaped(add(ops.multiply(node, alike)), batch, channels, 1, 1)

    mean = grouped(add(ops.reduce_mean(value, CELLS, True)))
    length = add(ops.reduce_l2(value, CELLS, True))
    squares = grouped(add(ops.multiply(length, length)))
    square = add(ops.multiply(squares, np.float32(1 / (height * width))))
    variance = add(ops.subtract(square, add(ops.multiply(mean, mean))))
    variance = add(ops.maximum(variance, np.float32(0)))
    inverse = add(ops.power(add(ops.add(variance, np.float32(epsilon))), np.float32(-0.5)))
    shift = add(ops.multiply(mean, inverse))
    add(ops.add(add(ops.multiply(value, spread(inverse, 1))), spread(shift, -1)))
    return made
