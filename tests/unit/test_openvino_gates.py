"""A gated layer in two gives what it gave whole, and what is not one is left."""

from __future__ import annotations

import gc

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine.backends.openvino import library
from sdengine.backends.openvino_gates import halve_gates

pytestmark = pytest.mark.ov

INNER, CHANNELS, TOKENS = 24, 8, 48  # as many tokens as channels of both halves


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


def gated(ops, rng, *, kind=np.int8, axis=-1, turned=True, watched=False, by_token=False):
    """x [TOKENS, CHANNELS] through a layer of twice INNER, cut in two, one half a gate."""
    whole = rng.integers(-127, 128, (2 * INNER, CHANNELS)).astype(kind)
    scale = rng.uniform(1e-3, 1e-2, (2 * INNER, 1)).astype(np.float32)
    bias = rng.standard_normal(2 * INNER, np.float32).astype(np.float16)
    x = ops.parameter((TOKENS, CHANNELS), np.float32, name="x")
    flat = ops.reshape(ops.constant(scale.ravel()), np.array([-1, 1]), special_zero=False)
    weight = ops.multiply(ops.convert(ops.constant(whole), "f32"), flat)
    if not turned:
        weight = ops.transpose(weight, np.array([1, 0]))
    product = ops.matmul(x, weight, False, turned)
    bias = bias[:TOKENS, None] if by_token else bias
    wide = ops.add(product, ops.convert(ops.constant(bias), "f32"))
    one, other = ops.split(wide, np.int64(axis), 2).outputs()
    ends = [ops.result(ops.multiply(one, ops.gelu(other, "erf")))]
    ends += [ops.result(ops.relu(wide))] if watched else []
    return library().Model(ends, [x], "gated")


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def is_whole(node):
    return node.get_type_name() == "Constant" and node.data.dtype == np.int8


def computed(model, x):
    run = library().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return run({0: x})[0]


@pytest.mark.parametrize("axis", [-1, 1])
def test_two_layers_give_what_one_gave(ops, axis):
    x = np.random.default_rng(1).standard_normal((TOKENS, CHANNELS), np.float32)
    before, after = (gated(ops, np.random.default_rng(0), axis=axis) for _ in range(2))
    assert halve_gates(after) == 1
    assert "Split" not in kinds(after)
    assert kinds(after).count("MatMul") == 2
    kept = [n.get_data() for n in after.get_ordered_ops() if n.get_type_name() == "Constant"]
    assert [w.shape for w in kept if w.dtype == np.int8] == [(INNER, CHANNELS)] * 2
    assert np.abs(computed(before, x) - computed(after, x)).max() < 1e-5


def test_halves_are_not_copied(ops):
    model = gated(ops, np.random.default_rng(0))
    (kept,) = (n for n in model.get_ordered_ops() if is_whole(n))
    start = kept.data.ctypes.data
    assert halve_gates(model) == 1
    halves = [n for n in model.get_ordered_ops() if is_whole(n)]
    wanted = [start, start + INNER * CHANNELS]
    assert sorted(n.data.ctypes.data for n in halves) == wanted


def test_halves_keep_what_they_lie_in(ops):
    """The model that they are of, and what its weight was read from, may be gone."""
    x = np.random.default_rng(1).standard_normal((TOKENS, CHANNELS), np.float32)
    model = gated(ops, np.random.default_rng(0))
    before = computed(model, x)
    halve_gates(model)
    gc.collect()
    others = [np.full((2 * INNER, CHANNELS), 99, np.int8) for _ in range(1000)]
    assert np.abs(before - computed(model, x)).max() < 1e-5
    assert len(others) == 1000


@pytest.mark.parametrize(
    "otherwise",
    [{"kind": np.float32}, {"axis": 0}, {"turned": False}, {"watched": True}, {"by_token": True}],
    ids=["not in int8", "tokens cut in two", "a turned weight", "read whole too", "bias by token"],
)
def test_what_is_left(ops, rng, otherwise):
    model = gated(ops, rng, **otherwise)
    before = kinds(model)
    assert halve_gates(model) == 0
    assert kinds(model) == before
