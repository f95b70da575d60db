"""What the rewrites of an openvino.Model ask of its nodes.

checked by  tests/unit/test_openvino_nodes.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.ports import Floats

RESHAPED = {"Convert", "Reshape", "Unsqueeze"}


@dataclass(frozen=True)
class Rounded:
    """A weight in int8. whole: [O, ...]; scale: what it is multiplied by, [O, 1, ...]"""

    whole: npt.NDArray[np.int8]
    scale: Floats

    @property
    def floats(self) -> Floats:
        return self.whole * self.scale


def only_user(node: Any) -> Any | None:
    """The node that computes with this one's result, where it is one alone."""
    users = [t.get_node() for t in node.output(0).get_target_inputs()]
    users = [u for u in users if u.get_type_name() != "ShapeOf"]
    return users[0] if len(users) == 1 else None


def constant(value: Any) -> npt.NDArray[Any] | None:
    """A constant's numbers in the shape that they end in, and in the type that they are kept in;
    in float32 for bfloat16, which numpy does not know and OpenVINO hands out as float16's bits."""
    node = value.get_node()
    if node.get_type_name() == "Constant":
        half = node.get_element_type().to_string() == "bf16"
        return np.asarray(node.get_data(dtype=np.float32) if half else node.get_data())
    if node.get_type_name() not in RESHAPED or node.output(0).get_partial_shape().is_dynamic:
        return None
    inside = constant(node.input_value(0))
    return None if inside is None else inside.reshape(node.get_output_shape(0))


def rounded(value: Any) -> Rounded | None:
    """A weight that lies in int8, a scale for each of its outputs; None of any other."""
    if value.get_node().get_type_name() != "Multiply":
        return None
    whole, scale = (constant(v) for v in value.get_node().input_values())
    if whole is None or scale is None or whole.dtype != np.int8:
        return None
    if scale.shape != (len(whole), *[1] * (whole.ndim - 1)):
        return None
    return Rounded(whole, scale.astype(np.float32))


def floats(value: Any) -> Floats | None:
    """A weight's or bias's numbers, in int8 or not; None of what is computed."""
    inside = rounded(value)
    if inside is not None:
        return inside.floats
    plain = constant(value)
    return None if plain is None else plain.astype(np.float32)


def biased(conv: Any) -> tuple[Any, Floats | None]:
    """Where a convolution of maps ends: in the sum with its bias, [1, O, 1, 1], or, without one, in
    itself."""
    outputs, end = conv.input_value(1).get_shape()[0], only_user(conv)
    bias = floats(end.input_value(1)) if end and end.get_type_name() == "Add" else None
    return (conv, None) if bias is None or bias.shape != (1, outputs, 1, 1) else (end, bias)


def state_shapes(model: Any) -> None:
    """Numbers in the place of what asks an openvino.Model of fixed shapes for one: it would keep
    what it asks alive, where that is rewritten."""
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    for node in model.get_ordered_ops():
        if node.get_type_name() == "ShapeOf" and node.input_value(0).get_partial_shape().is_static:
            shape = list(node.input_value(0).get_shape())
            stated = ops.constant(shape, node.get_element_type())
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(stated.output(0))
