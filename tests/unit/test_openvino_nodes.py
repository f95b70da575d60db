"""What is read of an OpenVINO graph's constants is what the graph computes with."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine.backends.openvino import library
from sdengine.backends.openvino_nodes import biased, constant, floats, only_user, rounded

pytestmark = pytest.mark.ov

NUMBERS = np.array([[1.0, 0.01], [-3.5, 2e-3]], np.float32)


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_numbers_are_what_they_stand_for(ops, kind):
    """numpy has no bfloat16: its bits, taken for float16's, would make 1.875 of 1."""
    stored = ops.constant(NUMBERS, dtype=getattr(library().Type, kind))
    wide = ops.reshape(ops.convert(stored, "f32"), np.array([4, 1]), special_zero=False)
    found = floats(wide.output(0))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, NUMBERS.reshape(4, 1), rtol=2**-8)


def test_a_weight_in_int8(ops):
    whole = np.array([[1, -127], [5, 0]], np.int8)
    scale = np.array([[0.5], [2.0]], np.float32)
    made = ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(scale))
    found = rounded(made.output(0))
    assert np.array_equal(found.whole, whole)
    assert np.array_equal(found.floats, whole * scale)
    assert np.array_equal(floats(made.output(0)), whole * scale)
    along = ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(scale.T))
    assert rounded(along.output(0)) is None, "a scale for each input"


def test_what_is_computed_is_no_constant(ops):
    x = ops.parameter([2, 2], np.float32)
    assert constant(x.output(0)) is None
    assert floats(ops.add(x, NUMBERS).output(0)) is None
    free = ops.parameter([-1], np.int64)
    shaped = ops.reshape(ops.constant(NUMBERS), free, special_zero=False)
    assert constant(shaped.output(0)) is None, "a shape that is not known"


def test_the_only_user(ops):
    x = ops.parameter([2, 2], np.float32)
    one = ops.relu(x)
    assert only_user(x).get_friendly_name() == one.get_friendly_name()
    ops.shape_of(x)
    assert only_user(x) is not None, "who asks for the shape does not compute"
    two = ops.exp(x)
    assert two is not None
    assert only_user(x) is None


def test_where_a_convolution_ends(ops):
    x = ops.parameter([1, 4, 8, 8], np.float32)
    weight, bias = ops.constant(np.ones((2, 4, 1, 1), np.float32)), np.ones((1, 2, 1, 1))
    ends = [0, 0], [0, 0], [1, 1]
    conv, other, plain = (ops.convolution(x, weight, [1, 1], *ends) for _ in range(3))
    end = ops.add(conv, bias.astype(np.float32))
    map_added = ops.add(other, ops.parameter([1, 2, 8, 8], np.float32))
    assert biased(conv)[0].get_friendly_name() == end.get_friendly_name()
    assert np.array_equal(biased(conv)[1], bias)
    assert map_added is not None
    for alone in (other, plain):
        found, none = biased(alone)
        assert found is alone
        assert none is None
