"""What the two halves of a guided step's rows have in common, computed once.

They differ by their text alone: the latent is the same, and the time. So is all that comes before
the first layer that sees the text: a UNet's first block, with an attention among all cells of the
map, than which nothing costs more. Here that part is computed for the first half of the rows, and
what it gives is handed on for both.

checked by  tests/unit/test_openvino_pairs.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .openvino_nodes import only_user, state_shapes

MOST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
COMMON = {"sample", "timestep"}  # inputs that are alike in both halves
RECIPE = "what rows have in common, once: 1"


def compute_once(model: Any) -> int:
    """Rewrite an openvino.Model whose rows are in two halves that differ by other inputs than
    COMMON. The first axis of all inputs, and of what is computed of them, is that of rows.

    model       of fixed shapes; with free ones, or an odd number of rows, it is left as it is
    returns     how many results are handed on twice
    """
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    half = _for_half(model)
    if half is None:
        return 0
    state_shapes(model)
    state_shapes(half)
    twins = {node.get_friendly_name(): node for node in half.get_ordered_ops()}
    ends = list(_ends(model))
    names = [end.get_node().get_friendly_name() for end, _ in ends]
    if not twins.keys() >= set(names):  # other shapes, other simplifications
        return 0
    pairs = [twins[n].output(end.get_index()) for n, (end, _) in zip(names, ends, strict=True)]
    doubled = [_twice(list(pair.get_shape())) for pair in pairs]
    if any(list(end.get_shape()) != shape for (end, _), shape in zip(ends, doubled, strict=True)):
        return 0
    for port in half.inputs:
        if not port.names.isdisjoint(COMMON):
            (whole,) = (p for p in model.inputs if p.names == port.names)
            first = ops.split(whole, 0, 2).output(0)
            for target in port.get_target_inputs():
                target.replace_source_output(first)
    for (_, targets), pair in zip(ends, pairs, strict=True):
        # Of two that are one OpenVINO would make a Tile, which is rounded to bfloat16.
        same = ops.clamp(pair, *MOST)
        both = ops.concat([pair, same], 0)
        for target in targets:
            target.replace_source_output(both.output(0))
    model.validate_nodes_and_infer_types()
    return len(ends)


def is_double(node: Any) -> bool:
    """Whether it hands one result on for both halves, or is what it needs to."""
    if node.get_type_name() == "Clamp":
        user = only_user(node)
        return user is not None and is_double(user)
    if node.get_type_name() != "Concat" or node.get_input_size() != 2:
        return False
    one, other = (value.get_node() for value in node.input_values())
    if other.get_type_name() != "Clamp":
        return False
    return bool(other.input_value(0).get_node().get_friendly_name() == one.get_friendly_name())


def _for_half(model: Any) -> Any | None:
    """The same for half the rows."""
    from openvino import PartialShape

    shapes = [port.get_partial_shape() for port in model.inputs]
    if any(s.is_dynamic or len(s) == 0 or s[0].get_length() % 2 for s in shapes):
        return None
    half = model.clone()
    rows = {port.any_name: list(port.get_shape()) for port in half.inputs}
    try:
        half.reshape({n: PartialShape([first // 2, *rest]) for n, (first, *rest) in rows.items()})
    except RuntimeError:  # rows that the graph says, not its inputs
        return None
    return half


def _ends(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Results of what is computed of COMMON alone, and the others' inputs that take them."""
    common: set[str] = set()
    constants: set[str] = set()
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if kind == "Parameter":
            within = not node.output(0).names.isdisjoint(COMMON)
        else:
            within = kind != "Result" and sources <= common | constants
        if within:
            (constants if sources <= constants and kind != "Parameter" else common).add(name)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in common or node.get_type_name() == "Parameter":
            continue
        for output in node.outputs():
            outside = [target for target in output.get_target_inputs()
                       if target.get_node().get_friendly_name() not in common]  # fmt: skip
            if outside:
                yield output, outside


def _twice(shape: list[int]) -> list[int]:
    return [2 * shape[0], *shape[1:]] if shape else []
