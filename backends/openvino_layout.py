"""Tokens as matrices, for int8 networks of OpenVINO on the processor.

Where a layer in bfloat16 meets a sum in float32, no layout fits both sides, and OpenVINO takes the
first on its list: "channels first", which of [B, T, C] takes the tokens for channels. Every sum and
norm of a transformer then turns its tensor round and back. A matrix has one layout only; so what a
network does with each token by itself, it does here with [B * T, C].

checked by  tests/unit/test_openvino_layout.py
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from .openvino_norms import channels_last_norms

ELEMENTWISE = {"Add", "Clamp", "Convert", "FakeQuantize", "Gelu", "Multiply", "Subtract"}
WITHIN = {"MVN", "Split"}  # along the last axis; they join where tokens are a matrix already
BEHIND = {"Concat"}  # rows behind rows, which join as those do
RECIPE = "norms of channels last, of int8 tokens as matrices: 3"

_Key = tuple[str, int]  # a value: its node's name, and which of its outputs


def rearrange(model: Any, tokens: bool) -> list[Any]:
    """What spares an openvino.Model copies of its tensors.

    model       of fixed shapes, a step's network; what has free dimensions is left as it is
    tokens      those of transformers too: in bfloat16 it costs pictures 0.8 dB (docs/numerics.md)
    returns     nodes that were made and are to be computed in float32
    """
    if tokens:
        tokens_as_they_lie(model)
        flatten_tokens(model)
    # Last: sums of groups are [B, G, 1], and as "tokens" would be rounded to bfloat16 on the way.
    return channels_last_norms(model)


def flatten_tokens(model: Any) -> int:
    """Rewrite what an openvino.Model does with [B, T, C], one token like another.

    model       what has free dimensions in it is left as it is
    returns     how many nodes were rewritten
    """
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    ways = _Ways(ops)
    computed: set[str] = set()
    done = 0
    for node in model.get_ordered_ops():
        values = node.input_values()
        if node.get_type_name() != "Parameter" and not any(_name(v) in computed for v in values):
            continue
        computed.add(node.friendly_name)
        if not ways.by_token(node, computed):
            ways.leave(node)
            continue
        ways.enter(node)
        done += 1
    model.validate_nodes_and_infer_types()
    return done


def tokens_as_they_lie(model: Any) -> int:
    """[B, C, H, W] to [B, H * W, C] by turning the map, which lies so, not what was made of it.

    returns     how many were rewritten
    """
    from openvino import opset13 as ops

    done = 0
    for node in model.get_ordered_ops():
        if not _turns(node):
            continue
        channels = node.input_value(0)
        value = channels.get_node().input_value(0)
        if _free(value) or len(value.get_shape()) != 4:
            continue
        if list(value.get_shape())[:2] != list(channels.get_shape())[:2]:
            continue
        batch, count, cells = channels.get_shape()
        turned = ops.transpose(value, np.array([0, 2, 3, 1]))
        made = ops.reshape(turned, np.array([batch, cells, count]), special_zero=False)
        if node.get_type_name() == "MatMul":
            turned_weight = bool(node.get_attributes()["transpose_b"])
            made = ops.matmul(made, node.input_value(1), False, turned_weight)
        made.set_friendly_name(node.get_friendly_name())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
        done += 1
    return done


def _turns(node: Any) -> bool:
    """Whether it turns a reshaped [B, C, T]: by itself, or as a part of the product."""
    kind = node.get_type_name()
    if kind not in ("Transpose", "MatMul") or any(map(_free, _values(node))):
        return False
    if node.input_value(0).get_node().get_type_name() != "Reshape":
        return False
    if len(node.input_value(0).get_shape()) != 3:
        return False
    if kind == "Transpose":
        return _axes(node.input_value(1)) == (0, 2, 1)
    return len(node.input_value(1).get_shape()) == 2 and bool(node.get_attributes()["transpose_a"])


class _Ways:
    """Between [B, T, C] and [B * T, C], each value's only once.

    matrices    values that are matrices now: their shape before
    """

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._matrices: dict[_Key, list[int]] = {}
        self._there: dict[_Key, Any] = {}
        self._back: dict[_Key, Any] = {}

    def by_token(self, node: Any, computed: set[str]) -> bool:
        kind, values = node.get_type_name(), node.input_values()
        if kind not in ELEMENTWISE | WITHIN | BEHIND | {"MatMul"} or any(map(_free, _values(node))):
            return False
        if kind in WITHIN:
            return _key(values[0]) in self._matrices and _axes(values[1]) in ((-1,), (2,))
        if kind in BEHIND:
            rows = node.get_attributes()["axis"] in (0, -3)
            return rows and all(_key(v) in self._matrices for v in values)
        if kind == "MatMul":
            left, right = (v.get_shape() for v in values)
            turned = node.get_attributes()["transpose_a"]
            return len(left) == 3 and len(right) == 2 and not turned
        shape = list(node.get_output_shape(0))
        return len(shape) == 3 and all(
            list(v.get_shape()) == shape
            if _name(v) in computed
            else prod(v.get_shape()) in (1, shape[-1]) and prod(v.get_shape()[:-1]) == 1
            for v in values
        )

    def enter(self, node: Any) -> None:
        """The node takes and gives matrices; shapes are wrong until they are inferred anew."""
        kind = node.get_type_name()
        shapes = [list(o.get_shape()) for o in node.outputs()]
        for port in node.inputs():
            value = port.get_source_output()
            if _key(value) in self._matrices:
                continue
            if kind in WITHIN:
                one = np.full(value.get_shape(), 1, np.int64)
                port.replace_source_output(self._ops.constant(one).output(0))
            elif len(value.get_shape()) == 3:
                port.replace_source_output(self._matrix(value))
        for output, shape in zip(node.outputs(), shapes, strict=True):
            self._matrices[_key(output)] = shape

    def leave(self, node: Any) -> None:
        """A node that is not rewritten takes what it took before."""
        for port in node.inputs():
            value = port.get_source_output()
            shape = self._matrices.get(_key(value))
            if shape is None:
                continue
            if _key(value) not in self._back:
                self._back[_key(value)] = self._reshape(value, shape)
            port.replace_source_output(self._back[_key(value)])

    def _matrix(self, value: Any) -> Any:
        if _key(value) not in self._there:
            *_, last = value.get_shape()
            self._there[_key(value)] = self._reshape(value, [-1, last])
        return self._there[_key(value)]

    def _reshape(self, value: Any, shape: list[int]) -> Any:
        return self._ops.reshape(value, np.array(shape, np.int64), special_zero=False).output(0)


def _values(node: Any) -> Iterator[Any]:
    yield from node.input_values()
    yield from node.outputs()


def _free(value: Any) -> bool:
    return bool(value.get_partial_shape().is_dynamic)


def _axes(value: Any) -> tuple[int, ...] | None:
    """Of a constant, or of a range of constants."""
    node = value.get_node()
    parts = node.input_values() if node.get_type_name() == "Range" else [value]
    if any(p.get_node().get_type_name() != "Constant" for p in parts):
        return None
    numbers = [p.get_node().get_data() for p in parts]
    found = np.arange(*map(int, numbers)) if len(parts) == 3 else np.atleast_1d(numbers[0])
    return tuple(int(n) for n in found)


def _key(value: Any) -> _Key:
    return value.get_node().friendly_name, value.get_index()


def _name(value: Any) -> str:
    return str(value.get_node().friendly_name)
