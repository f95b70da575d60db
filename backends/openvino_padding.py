"""Convolutions in int8 without zero points, for OpenVINO on the processor.

What comes to a convolution lies in 8 bits with a zero point, as SiLU is not even. Zeros around the
map are that number then, and OpenVINO, whose kernels pad with 0, corrects the borders from all
weights in every call; and to prepare them it reads a weight five times as slowly when the network
is loaded. Here the map is padded with its zero point first. All cells then lie equally far from
what they stand for, and a part of the bias sets that right.

checked by  tests/unit/test_openvino_padding.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.ports import Floats
from .openvino_nodes import Rounded, biased, constant, rounded

RECIPE = "int8 convolutions without zero points: 1"


@dataclass(frozen=True)
class _Found:
    """conv, end   the convolution, and the sum with its bias where there is one
    steps       its input in 8 bits, [B, I, h, w]
    zero        the number that stands for 0 there, in its type
    step        what each counts
    weight      int8 [O, I, kh, kw] and its scales
    bias        [1, O, 1, 1]
    """

    conv: Any
    end: Any
    steps: Any
    zero: Any
    step: Floats
    weight: Rounded
    bias: Floats


def pad_with_zero_points(model: Any) -> int:
    """Rewrite the convolutions of an openvino.Model whose weights outweigh their maps.

    model       what has free dimensions in it is left as it is, and so is what is not in int8
    returns     how many were rewritten
    """
    all_found = [f for node in model.get_ordered_ops() if (f := _found(node)) is not None]
    for found in all_found:
        made = _padded(found)
        made.set_friendly_name(found.end.get_friendly_name())
        for target in found.end.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
    return len(all_found)


def _found(conv: Any) -> _Found | None:
    if conv.get_type_name() != "Convolution" or not any(_pads(conv)):
        return None
    scaled = conv.input_value(0).get_node()
    chain = [scaled]
    for kind in ("Multiply", "Subtract", "Convert"):
        if chain[-1].get_type_name() != kind:
            return None
        chain.append(chain[-1].input_value(0).get_node())
    steps = chain[2].input_value(0)
    if steps.get_element_type().to_dtype() not in (np.int8, np.uint8):
        return None
    step, zero = constant(scaled.input_value(1)), constant(chain[1].input_value(1))
    weight = rounded(conv.input_value(1))
    if step is None or zero is None or weight is None or step.size != 1 or zero.size != 1:
        return None
    if not zero.any() or steps.get_partial_shape().is_dynamic or weight.whole.ndim != 4:
        return None
    if weight.whole.size < np.prod(steps.get_shape()):
        return None  # to copy the map would take as long as is spared
    end, bias = biased(conv)
    bias = np.zeros((1, len(weight.whole), 1, 1), np.float32) if bias is None else bias
    return _Found(conv, end, steps, zero.reshape(()), step, weight, bias)


def _pads(conv: Any) -> tuple[int, ...]:
    """Rows above, columns before, rows below, columns behind."""
    attributes = conv.get_attributes()
    return (*attributes["pads_begin"], *attributes["pads_end"])


def _padded(found: _Found) -> Any:
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    conv = found.conv
    above, before, below, behind = _pads(conv)
    kind = found.steps.get_element_type().to_dtype()
    begin, end = np.array([0, 0, above, before]), np.array([0, 0, below, behind])
    wide = ops.pad(found.steps, begin, end, "constant", found.zero.astype(kind))
    value = ops.multiply(ops.convert(wide, "f32"), np.float32(found.step.item()))
    attributes = conv.get_attributes()
    strides, dilations = (list(attributes[name]) for name in ("strides", "dilations"))
    made = ops.convolution(value, conv.input_value(1), strides, [0, 0], [0, 0], dilations)
    sums = found.weight.whole.sum((1, 2, 3), dtype=np.int64, keepdims=True) * found.weight.scale
    moved = float(found.step.item()) * float(found.zero) * sums.reshape(found.bias.shape)
    return ops.add(made, (found.bias - moved).astype(np.float32))
