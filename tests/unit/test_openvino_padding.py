"""A convolution in int8 of a map padded with its zero point gives what it gave, without one."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine.backends.openvino import library
from sdengine.backends.openvino_padding import pad_with_zero_points

pytestmark = pytest.mark.ov

CHANNELS, OUT, SIDE, STEP = 8, 96, 6, 1 / 32
ALL_ROUND = (1, 1, 1, 1)


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


def model_of(
    ops,
    *,
    zero=40,
    kind=np.uint8,
    kernel=3,
    pads=ALL_ROUND,
    stride=1,
    bias=True,
    out=OUT,
    free=False,
    floats=False,
    dilation=1,
    batch=1,
    half=None,
    shared=False,
):
    """x [batch, CHANNELS, SIDE, SIDE] -> 8 bits and back -> a convolution in int8, as ONNX's
    QuantizeLinear and DequantizeLinear are read. pads: above, before, below, behind."""
    rng = np.random.default_rng(0)
    least, most = (0, 255) if kind == np.uint8 else (-128, 127)
    x = ops.parameter([batch, CHANNELS, *[-1 if free else SIDE] * 2], np.float32, name="x")
    ends = (np.float32((n - zero) * STEP) for n in (least, most))
    steps = ops.fake_quantize(x, *ends, np.float32(least), np.float32(most), 256)
    whole = ops.convert(ops.convert(steps, {np.uint8: "u8", np.int8: "i8"}[kind]), "f32")
    away = ops.subtract(whole, ops.convert(ops.constant(kind(zero)), "f32"))
    value = ops.multiply(away, np.float32(STEP))
    weight = rng.integers(-127, 128, (out, CHANNELS, kernel, kernel))
    scale = rng.uniform(1e-4, 1e-3, (out, 1, 1, 1)).astype(np.float32)
    weight = ops.constant(weight.astype(np.float32 if floats else np.int8))
    scaled = ops.multiply(weight if floats else ops.convert(weight, "f32"), scale)
    made = ops.convolution(value, scaled, [stride] * 2, pads[:2], pads[2:], [dilation] * 2)
    moved = rng.standard_normal((1, out, 1, 1)).astype(np.float32)
    if half is not None:  # as weights that are stored in it are read
        moved = ops.convert(ops.constant(moved, dtype=half), "f32")
    if bias:
        made = ops.add(made, moved)
    if shared:
        other = ops.convolution(value, scaled, [stride] * 2, pads[:2], pads[2:], [dilation] * 2)
        made = ops.add(made, ops.relu(other))
    return library().Model([ops.result(made)], [x], "m")


def computed(model, x):
    """In float32: whether OpenVINO rounds as the graph says is not the question here."""
    run = library().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return run({0: x})[0]


def convolutions(model):
    return [n for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"kind": np.int8, "zero": -90},
        {"bias": False},
        {"stride": 2},
        {"dilation": 2, "pads": (2, 2, 2, 2)},
        {"batch": 2},
        {"half": "f16"},
        {"half": "bf16"},
        {"shared": True},
        {"pads": (0, 0, 1, 1), "stride": 2},
        *({"kernel": 2, "pads": (1 - a, 1 - b, a, b)} for a in (0, 1) for b in (0, 1)),
    ],
    ids=str,
)
def test_the_result_is_the_same(ops, rng, way):
    way = {**way, "half": way.get("half") and getattr(library().Type, way["half"])}
    x = rng.standard_normal((way.get("batch", 1), CHANNELS, SIDE, SIDE), np.float32)
    before, after = model_of(ops, **way), model_of(ops, **way)
    assert pad_with_zero_points(after) == len(convolutions(after))
    for conv in convolutions(after):
        assert not any((*conv.get_attributes()["pads_begin"], *conv.get_attributes()["pads_end"]))
        value = conv.input_value(0).get_node().input_value(0).get_node()
        assert value.get_type_name() == "Convert", "no zero point is taken away"
    due = computed(before, x)
    assert np.abs(computed(after, x) - due).max() < 1e-5 * np.abs(due).max()


def test_it_runs_in_int8(ops):
    """OpenVINO does not take the padding for a reason to compute in float."""
    before, after = model_of(ops), model_of(ops)
    assert pad_with_zero_points(after) == 1
    for model in (before, after):
        config = {"INFERENCE_PRECISION_HINT": "bf16"}
        nodes = library().Core().compile_model(model, "CPU", config).get_runtime_model().get_ops()
        kinds = [n.get_rt_info()["primitiveType"].astype(str) for n in nodes]
        layers = [n.get_rt_info()["layerType"].astype(str) for n in nodes]
        assert kinds[layers.index("Convolution")].endswith("I8"), kinds


@pytest.mark.parametrize(
    "way",
    [
        {"zero": 0},
        {"pads": (0, 0, 0, 0)},
        {"free": True},
        {"floats": True},
        {"out": 3},
    ],
    ids=[
        "zero is zero",
        "nothing is padded",
        "free dimensions",
        "weights not in int8",
        "a map that outweighs its weights",
    ],
)
def test_what_is_left(ops, way):
    model = model_of(ops, **way)
    assert pad_with_zero_points(model) == 0
    assert "Pad" not in [node.get_type_name() for node in model.get_ordered_ops()]


def test_a_row_of_numbers_is_no_map(ops):
    """[1, C, n], convolved along n; whatever its numbers are."""
    x = ops.parameter([1, CHANNELS, SIDE], np.float32)
    steps = ops.convert(ops.fake_quantize(x, *map(np.float32, (-1, 1, 0, 255)), 256), "u8")
    away = ops.subtract(ops.convert(steps, "f32"), np.float32(128))
    weight = ops.multiply(ops.convert(ops.constant(np.ones((OUT, CHANNELS, 3), np.int8)), "f32"),
                          np.ones((OUT, 1, 1), np.float32))  # fmt: skip
    made = ops.convolution(ops.multiply(away, np.float32(STEP)), weight, [1], [1], [1], [1])
    assert pad_with_zero_points(library().Model([ops.result(made)], [x], "m")) == 0
