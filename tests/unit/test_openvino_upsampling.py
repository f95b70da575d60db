"""Convolutions of a doubled map give on the small map what they gave."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine import api
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO, library
from sdengine.backends.openvino_upsampling import convolve_before
from sdengine.engine.bundle import open_bundle
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.ov

WAY = {
    "mode": "nearest",
    "shape_calculation_mode": "scales",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


def computed(model, x, precision="f32"):
    core = library().Core()
    run = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return next(iter(run({0: x}).values()))


def enlarging(ops, shape, behind, **way):
    """x [B, 6, h, w] -> twice as large -> what `behind` makes of it."""
    x = ops.parameter(shape, np.float32, name="x")
    scales = np.array([1, 1, 2, 2], np.float32)
    large = ops.interpolate(x, scales, **{**WAY, **way})
    return library().Model([ops.result(value) for value in behind(large)], [x], "m")


def convolved(ops, *, bias=True, strides=(1, 1), pads=(1, 1), size=3):
    """A convolution as a bundle has it: weights in half precision, widened."""
    rng = np.random.default_rng(1)
    weight = ops.constant((rng.standard_normal((5, 6, size, size)) / 8).astype(np.float16))
    added = rng.standard_normal((1, 5, 1, 1)).astype(np.float32)

    def behind(large):
        wide = ops.convert(weight, "f32")
        out = ops.convolution(large, wide, list(strides), list(pads), list(pads), [1, 1])
        return [ops.add(out, added) if bias else out]

    return behind


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 1, 1), (1, 6, 2, 9)])
def test_on_the_small_map(ops, rng, shape, bias):
    """Borders too: what is beyond them is 0 on both maps."""
    x = rng.standard_normal(shape).astype(np.float32)
    before, after = (enlarging(ops, shape, convolved(ops, bias=bias)) for _ in range(2))
    assert convolve_before(after) == 1
    assert "Interpolate" not in kinds(after)
    assert kinds(after).count("Convolution") == 4
    np.testing.assert_allclose(computed(after, x), computed(before, x), atol=1e-5)


def rounded(ops):
    """To 8 bits and back with a zero point, then a convolution with int8 weights."""
    rng = np.random.default_rng(2)
    steps = ops.constant(rng.integers(-127, 128, (5, 6, 3, 3)).astype(np.int8))
    scales = (rng.random((5, 1, 1, 1)) / 500).astype(np.float32)
    added = rng.standard_normal((1, 5, 1, 1)).astype(np.float32)

    def behind(large):
        divided = ops.multiply(large, np.linspace(0.5, 2, 6, dtype=np.float32).reshape(6, 1, 1))
        ends = [np.float32(n) for n in (-1, 3, 0, 255)]
        stepped = ops.convert(ops.fake_quantize(divided, *ends, 256), "u8")
        zero = ops.convert(ops.constant(np.uint8(64)), "f32")
        back = ops.multiply(ops.subtract(ops.convert(stepped, "f32"), zero), np.float32(4 / 255))
        weight = ops.multiply(ops.convert(steps, "f32"), scales)
        return [ops.add(ops.convolution(back, weight, [1, 1], [1, 1], [1, 1], [1, 1]), added)]

    return behind


def test_sums_of_int8_weights_are_int8(ops, rng):
    x = rng.standard_normal((1, 6, 6, 4)).astype(np.float32)
    before, after = (enlarging(ops, x.shape, rounded(ops)) for _ in range(2))
    assert convolve_before(after) == 1
    constants = [n for n in after.get_ordered_ops() if n.get_type_name() == "Constant"]
    kernels = [n for n in constants if list(n.get_output_shape(0))[2:] == [2, 2]]
    assert [n.get_element_type().to_string() for n in kernels] == ["i8"] * 4
    old, new = computed(before, x), computed(after, x)
    assert np.square(new - old).mean() < 1e-4 * np.square(old).mean(), "weights rounded once more"


def twice_used(ops):
    once = convolved(ops)
    return lambda large: [*once(large), ops.relu(large)]


def by_cell(ops):
    once = convolved(ops)
    return lambda large: once(ops.multiply(large, np.ones((14, 10), np.float32)))


OTHERS = {
    "a stride": (lambda ops: convolved(ops, strides=(2, 2)), {}),
    "no padding": (lambda ops: convolved(ops, pads=(0, 0)), {}),
    "another kernel": (lambda ops: convolved(ops, size=1), {}),
    "the large map is used elsewhere": (twice_used, {}),
    "something for each cell": (by_cell, {}),
    "another interpolation": (convolved, {"mode": "linear"}),
    "other neighbours": (convolved, {"nearest_mode": "ceil"}),
}


@pytest.mark.parametrize("why", OTHERS)
def test_others_are_left(ops, why):
    behind, way = OTHERS[why]
    model = enlarging(ops, (2, 6, 7, 5), behind(ops), **way)
    assert convolve_before(model) == 0
    assert "Interpolate" in kinds(model)


def test_free_dimensions_are_left(ops):
    assert convolve_before(enlarging(ops, [-1, 6, 7, 5], convolved(ops))) == 0


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_of_the_embedded_model(name):
    """Every upsampling of it, as it is read from a bundle."""
    component = open_bundle(api.find_model("emoji")).components[name]
    graph, dims = component.graphs["full"], {"B": 1, "T": 77, "h": 8, "w": 8}
    network = OpenVINO(Store(limit=0)).compile(component, graph, Profile(dims, "f32", 1))
    ran = network._compiled.get_runtime_model().get_ordered_ops()
    what = [node.get_rt_info()["layerType"].astype(str) for node in ran]
    assert what.count("DepthToSpace") == 3
    assert "Interpolate" not in what
