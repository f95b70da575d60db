"""The two halves of a gated layer as two layers, for int8 networks of OpenVINO on the processor.

A GEGLU multiplies one half of what a linear layer gives with GELU of the other. OpenVINO copies the
halves to cut them apart. Here the rows of the layer's weight are cut, when the network is compiled,
and GELU becomes the end of its own layer.

checked by  tests/unit/test_openvino_gates.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.ports import Floats
from .mapping import writable
from .openvino_nodes import Rounded, constant, floats, only_user, rounded

RECIPE = "gates of int8 layers as two layers: 1"


def halve_gates(model: Any) -> int:
    """Rewrite the gated layers of an openvino.Model whose weights are int8; others stay.

    returns     how many were rewritten
    """
    from openvino import op  # type: ignore[import-untyped]
    from openvino import opset13 as ops

    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Split" or (found := _gated(node)) is None:
            continue
        value, weight, bias = found
        parts = (np.split(a, 2) for a in (weight.whole, weight.scale, bias))
        for output, whole, scale, moved in zip(node.outputs(), *parts, strict=True):
            rows = op.Constant(writable(whole), shared_memory=True)  # of the file, not copied
            half = ops.multiply(ops.convert(rows, "f32"), scale)
            made = ops.add(ops.matmul(value, half, False, True), moved)
            for target in output.get_target_inputs():
                target.replace_source_output(made.output(0))
        done += 1
    return done


def _gated(split: Any) -> tuple[Any, Rounded, Floats] | None:
    """(input [..., C], weight [2 N, C], bias [2 N]) of a layer in int8 whose result is cut in two
    along its last axis, and not read otherwise."""
    value, axis = split.input_values()
    rank = value.get_partial_shape().rank
    if split.get_output_size() != 2 or rank.is_dynamic:
        return None
    if constant(axis) not in (-1, rank.get_length() - 1):
        return None
    added = value.get_node()
    if added.get_type_name() != "Add" or only_user(added) is None:
        return None
    product = added.input_value(0).get_node()
    if product.get_type_name() != "MatMul":
        return None
    turned = product.get_attributes()
    if turned["transpose_a"] or not turned["transpose_b"]:
        return None
    weight, bias = rounded(product.input_value(1)), floats(added.input_value(1))
    if weight is None or bias is None or weight.whole.ndim != 2:
        return None
    # one number for each channel, not for each token
    if bias.shape[-1:] != (bias.size,) or bias.size != len(weight.whole):
        return None
    return product.input_value(0), weight, bias.reshape(-1)
