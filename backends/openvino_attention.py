"""A very large attention by blocks of queries, for OpenVINO on the processor.

OpenVINO fuses an attention into one kernel that reads all keys and values anew for a few queries
at a time. With one head as wide as a VAE's map that is far from what the processor can do, and the
farther the larger the map; spelled out as matrix products it is several times faster, but then
writes all its scores down. So a large one is spelled out for a block of queries, and the block is
run on all of them in turn: docs/numerics.md, Tiles, has the figures.

checked by  tests/unit/test_openvino_attention.py
"""

from __future__ import annotations

import math
from typing import Any

SCORES = 512 << 20  # bytes of float32 scores that may be in memory at once
FEWEST, MOST = 64, 1024  # queries of a block: fewer are slow, more are no faster
RECIPE = "by blocks of queries: 1"


def split_queries(model: Any, scores: int = SCORES) -> int:
    """Rewrite the attentions of an openvino.Model that have one head and too many scores.

    scores      bytes; smaller ones, and those of free dimensions, are left as they are
    returns     how many were rewritten
    """
    found = [a for node in model.get_ordered_ops() if (a := _attention(node)) is not None]
    done = 0
    for queries, keys, values, transposed, end in found:
        tokens = queries.get_shape()[2]
        rows = _rows(tokens, scores // (4 * values.get_shape()[2]))
        if rows is None:
            continue
        made = _in_blocks(queries, keys, values, transposed, rows)
        made.set_friendly_name(end.get_friendly_name())
        for target in end.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
        done += 1
    return done


def _attention(softmax: Any) -> tuple[Any, Any, Any, bool, Any] | None:
    """(queries, keys, values, whether keys are transposed in the product, the product's node)."""
    if softmax.get_type_name() != "Softmax":
        return None
    before = softmax.input_value(0).get_node()
    after = [t.get_node() for t in softmax.output(0).get_target_inputs()]
    if before.get_type_name() != "MatMul" or [n.get_type_name() for n in after] != ["MatMul"]:
        return None
    (end,) = after
    ports = (*before.input_values(), end.input_value(1))
    if any(p.get_partial_shape().is_dynamic or len(p.get_shape()) != 4 for p in ports):
        return None
    if any(p.get_shape()[1] != 1 for p in ports):
        return None
    first, last = before.get_attributes(), end.get_attributes()
    if first["transpose_a"] or last["transpose_a"] or last["transpose_b"]:
        return None
    return (*ports, bool(first["transpose_b"]), end)


def _rows(tokens: int, most: int) -> int | None:
    """Queries of a block, a divisor of all; None where one block, or none, would do."""
    if tokens <= most:
        return None
    rows = max(n for n in _divisors(tokens) if n <= max(min(most, MOST), 1))
    return None if rows < FEWEST else rows


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*small, *(number // n for n in small)]


def _in_blocks(queries: Any, keys: Any, values: Any, transposed: bool, rows: int) -> Any:
    """The loop, over the third axis. Its exponentials are a node of their own: a Softmax between
    two products would be fused again."""
    from openvino import Model  # type: ignore[import-untyped]
    from openvino import opset13 as ops
    from openvino.op import tensor_iterator  # type: ignore[import-untyped]

    shapes = [list(p.get_shape()) for p in (queries, keys, values)]
    shapes[0][2] = rows
    q, k, v = (
        ops.parameter(shape, p.get_element_type())
        for shape, p in zip(shapes, (queries, keys, values), strict=True)
    )
    last = ops.constant([-1])
    scores = ops.matmul(q, k, False, transposed)
    shares = ops.exp(ops.subtract(scores, ops.reduce_max(scores, last, True)))
    total = ops.reduce_sum(shares, last, True)
    result = ops.result(ops.divide(ops.matmul(shares, v, False, False), total))
    loop = tensor_iterator()
    loop.set_body(Model([result], [q, k, v], "block"))
    loop.set_sliced_input(q, queries, 0, rows, rows, -1, 2)
    loop.set_invariant_input(k, keys)
    loop.set_invariant_input(v, values)
    loop.get_concatenated_slices(result.output(0), 0, rows, rows, -1, 2)
    return loop
