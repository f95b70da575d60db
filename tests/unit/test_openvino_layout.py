"""What is rewritten for OpenVINO's layouts gives what it gave, and spares what it should."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine import api
from sdengine.backends import openvino_layout
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO, library
from sdengine.backends.openvino_norms import channels_last_norms
from sdengine.engine.bundle import open_bundle
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.ov

DIMS = {"B": 2, "T": 77, "h": 16, "w": 16}


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


def computed(model, x):
    """In float32, as the processor's own plugin has it."""
    core = library().Core()
    run = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(run({0: x}).values()))


def model_of(ops, shape, build):
    openvino = library()
    x = ops.parameter(shape, np.float32, name="x")
    return openvino.Model([ops.result(build(x))], [x], "m")


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def group_norm(ops, x, groups):
    """As ONNX's InstanceNormalization of groups is read."""
    shape = list(x.get_output_shape(0) if hasattr(x, "get_output_shape") else x.get_shape())
    flat = ops.reshape(x, np.array([shape[0], groups, -1]), special_zero=False)
    normed = ops.mvn(flat, np.array([2]), True, 1e-5, "inside_sqrt")
    scaled = ops.multiply(normed, np.ones((1, groups, 1), np.float32))
    moved = ops.add(scaled, np.zeros((1, groups, 1), np.float32))
    return ops.reshape(moved, np.array(shape), special_zero=False)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_norm_of_channels_last(ops, rng, mean):
    x = (mean + rng.standard_normal((2, 8, 6, 5))).astype(np.float32)
    model = model_of(ops, x.shape, lambda x: group_norm(ops, x, 4))
    made = channels_last_norms(model)
    assert "MVN" not in kinds(model)
    assert len(made) > 10
    groups = x.astype(np.float64).reshape(2, 4, -1)
    spread = groups - groups.mean(-1, keepdims=True)
    expected = spread / np.sqrt(np.mean(spread**2, -1, keepdims=True) + 1e-5)
    # a mean of 30 deviations: its square takes 900 times the rounding of the variance
    assert np.abs(computed(model, x) - expected.reshape(x.shape)).max() < (
        2e-6 if not mean else 2e-3
    )


def test_a_norm_of_what_is_nearly_constant(ops, rng):
    """Its variance, of a mean square less a square, can come out below zero."""
    x = (1000 + 1e-3 * rng.standard_normal((2, 256, 6, 5))).astype(np.float32)
    model = model_of(ops, x.shape, lambda x: group_norm(ops, x, 128))
    assert channels_last_norms(model)
    assert np.isfinite(computed(model, x)).all()


def test_sums_of_groups_are_no_tokens(ops, rng):
    """[B, G, 1] looks like tokens; on the way to a matrix and back it would be rounded to
    bfloat16, and a variance that is the difference of two such sums be lost."""
    shape = (2, 8, 6, 5)
    weight = rng.standard_normal((8, 8)).astype(np.float32)

    def build(x):
        normed = group_norm(ops, x, 4)
        channels = ops.reshape(normed, np.array([2, 8, 30]), special_zero=False)
        tokens = ops.transpose(channels, np.array([0, 2, 1]))
        return ops.add(ops.matmul(tokens, weight, False, True), tokens)

    model = model_of(ops, shape, build)
    made = openvino_layout.rearrange(model, tokens=True)
    assert "MVN" not in kinds(model)
    own = {node.get_friendly_name() for node in made} | {"x"}
    sources = [v.get_node() for node in made for v in node.input_values()]
    assert {s.get_friendly_name() for s in sources if s.get_type_name() != "Constant"} <= own
    tokens = [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]
    assert len(tokens[0].get_output_shape(0)) == 2, "those of the transformer are matrices"


def test_a_norm_with_weights_of_its_own_is_left(ops, rng):
    def build(x):
        flat = ops.reshape(x, np.array([2, 4, -1]), special_zero=False)
        normed = ops.mvn(flat, np.array([2]), True, 1e-5, "inside_sqrt")
        scaled = ops.multiply(normed, np.full((1, 4, 1), 2, np.float32))
        moved = ops.add(scaled, np.zeros((1, 4, 1), np.float32))
        return ops.reshape(moved, np.array([2, 8, 6, 5]), special_zero=False)

    model = model_of(ops, (2, 8, 6, 5), build)
    assert channels_last_norms(model) == []


def transformer(ops, rng, *, turned_in_product=False):
    """Map -> tokens -> sum, norm, gate, layer, sum -> map, with random weights."""

    def weight(rows, columns):
        return ops.constant((rng.standard_normal((rows, columns)) / 4).astype(np.float32))

    first, out, gate, back = (weight(*shape) for shape in ((8, 8), (8, 8), (24, 8), (8, 12)))
    bias = (rng.standard_normal(24) / 4).astype(np.float32)

    def build(x):
        channels = ops.reshape(x, np.array([2, 8, 30]), special_zero=False)
        if turned_in_product:
            start = ops.matmul(channels, first, True, True)
        else:
            start = ops.matmul(ops.transpose(channels, np.array([0, 2, 1])), first, False, True)
        summed = ops.add(start, ops.matmul(start, out, False, True))
        normed = ops.mvn(summed, np.array([2]), True, 1e-5, "inside_sqrt")
        wide = ops.add(ops.matmul(normed, gate, False, True), bias)
        halves = ops.split(wide, np.int64(2), 2)
        gated = ops.multiply(halves.output(0), ops.gelu(halves.output(1), "erf"))
        end = ops.add(summed, ops.matmul(gated, back, False, True))
        turned = ops.transpose(end, np.array([0, 2, 1]))
        return ops.reshape(turned, np.array([2, 8, 6, 5]), special_zero=False)

    return build


@pytest.mark.parametrize("turned_in_product", [False, True])
def test_tokens_as_matrices(ops, turned_in_product):
    x = np.random.default_rng(0).standard_normal((2, 8, 6, 5)).astype(np.float32)

    def made():
        build = transformer(ops, np.random.default_rng(1), turned_in_product=turned_in_product)
        return model_of(ops, x.shape, build)

    before, after = made(), made()
    assert openvino_layout.rearrange(after, tokens=True) == []
    assert np.abs(computed(before, x) - computed(after, x)).max() < 1e-5
    adds = [n for n in after.get_ordered_ops() if n.get_type_name() in ("Add", "MVN", "Gelu")]
    assert adds
    assert all(len(n.get_output_shape(0)) == 2 for n in adds)


def test_what_mixes_tokens_is_left(ops, rng):
    """Something for each place in the sequence, the same for all channels."""
    places = rng.standard_normal((1, 30, 1)).astype(np.float32)
    x = rng.standard_normal((2, 30, 8)).astype(np.float32)
    model = model_of(ops, x.shape, lambda x: ops.add(x, places))
    assert openvino_layout.flatten_tokens(model) == 0
    assert np.array_equal(computed(model, x), x + places)


def test_free_dimensions_are_left(ops):
    model = model_of(ops, [-1, 30, 8], lambda x: ops.add(x, x))
    assert openvino_layout.flatten_tokens(model) == 0


@pytest.mark.parametrize("tokens", [False, True])
def test_of_the_embedded_model(monkeypatch, tokens):
    """Norms alone come closer to float32; no tokens are turned where that is asked for, which
    this network, in bfloat16, is not better for."""
    unet = open_bundle(api.find_model("emoji")).components["unet"]
    backend = OpenVINO(Store(limit=0))
    if "bf16" not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16")
    rng = np.random.default_rng(3)
    graph = unet.graphs["full"]
    feeds = []  # several: of forty single draws one was nearer to float32 without
    for time in (901, 601, 301, 51):
        draw = {t.name: rng.standard_normal(t.resolve(DIMS)) for t in graph.inputs}
        draw["timestep"][:] = time
        feeds.append({name: value.astype(np.float32) for name, value in draw.items()})

    def run(precision):
        network = backend.compile(unet, graph, Profile(DIMS, precision, 1))
        nodes = network._compiled.get_runtime_model().get_ordered_ops()
        shapes = [
            tuple(node.get_output_shape(0))
            for node in nodes
            if node.get_rt_info()["outputLayouts"].astype(str) == "acb"
        ]
        call = network.open({})
        return np.stack([call(draw)["out_sample"] for draw in feeds]), shapes

    exact, _ = run("f32")
    rearrange = openvino_layout.rearrange
    monkeypatch.setattr(openvino_layout, "rearrange", lambda model, _: rearrange(model, tokens))
    now, lying = run("bf16")
    monkeypatch.setattr(openvino_layout, "rearrange", lambda model, _: [])
    plain, turned = run("bf16")
    groups = (1, 32)  # a norm's own small sums, no tokens
    assert sum(n not in groups for _, n, _ in turned) > 20, "what OpenVINO does by itself"
    assert all(n in groups for _, n, _ in lying) == tokens
    lost = [np.mean((made - exact) ** 2) for made in (now, plain)]
    assert lost[0] < (1.3 if tokens else 1) * lost[1], lost


def test_nothing_of_a_norm_is_rounded_to_bfloat16():
    """Not the way from sums of groups, [B, 32, ...], to what channels are scaled and moved by."""
    unet = open_bundle(api.find_model("emoji")).components["unet"]
    backend = OpenVINO(Store(limit=0))
    if "bf16" not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16")
    network = backend.compile(unet, unet.graphs["full"], Profile(DIMS, "bf16", 1))
    nodes = network._compiled.get_runtime_model().get_ordered_ops()
    shapes = [list(n.get_output_shape(0)) if n.get_output_size() else [] for n in nodes]
    kept = [
        node.get_rt_info()["outputPrecisions"].astype(str)
        for node, shape in zip(nodes, shapes, strict=True)
        if len(shape) == 3 and shape[1] == 32
    ]
    assert len(kept) > 100
    assert set(kept) == {"f32"}
