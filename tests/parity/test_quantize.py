"""int8 networks: rounding against torch, one graph on two engines, the gate, the strict reader."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest

from sdengine import api
from sdengine.backends.cache import Store
from sdengine.backends.onnxruntime import OnnxRuntime
from sdengine.backends.openvino import OpenVINO
from sdengine.backends.openvino_weights import remap
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BadManifest, ParityFailure, RequestError
from sdengine.engine.spec import Profile
from sdengine.engine.weights import read_header
from sdengine.export import add_target, quantize, search
from sdengine.export.calibration import read_prompts
from sdengine.export.graph.count import by_node
from sdengine.export.graph.gates import GATES, gated
from sdengine.export.graph.quantize import Grid, Layer, layers, rounded_weight
from sdengine.export.graph.tools import save
from sdengine.export.observe import Seen, grid
from sdengine.export.parity import distance
from sdengine.export.smooth import Fit, fit

pytestmark = [pytest.mark.export, pytest.mark.ov]

WIDE = {"unet": 32, "vae_decoder": 500}  # what comes to an upsampling, of noise
PROMPTS = ("a fox", "a green cup on a table")


@pytest.fixture(scope="module")
def quantised(mini_bundle, tmp_path_factory):
    """(bundle with int8, the one that it was made from)"""
    path = tmp_path_factory.mktemp("int8") / "mini"
    shutil.copytree(mini_bundle, path)
    before = open_bundle(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "LEAST_DB", {"vae_decoder": 25.0})
        add_target(path, ["openvino"], ["int8"], prompts=PROMPTS)
    return open_bundle(path), before


def feeds(rng):
    return {
        "sample": rng.standard_normal((2, 4, 16, 16), np.float32),
        "timestep": np.full(2, 400, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32), np.float32),
    }


def test_int8_is_judged_and_stands_beside_the_rest(quantised):
    bundle, before = quantised
    assert bundle.targets["openvino"].precisions[0] == "int8"
    assert set(before.targets["openvino"].precisions) < set(bundle.targets["openvino"].precisions)
    judged = {(r.component, r.runtime) for r in bundle.parity if r.precision == "int8"}
    assert judged == {(c, "openvino") for c in bundle.components}
    assert all(r.psnr_db > 25 for r in bundle.parity if r.precision == "int8")
    for name, file in before.files.items():
        assert bundle.files[name] == file, "what was there is untouched"


def test_int8_weights_are_about_half_of_float16(quantised):
    bundle, _ = quantised
    unet = bundle.components["unet"]
    twin = unet.at("int8")
    # of a network this small the ends of its levels, which stay in float, are a large part
    assert twin.weights.stat().st_size < 0.7 * unet.weights.stat().st_size
    stored = read_header(twin.weights)
    kinds = [t.dtype for t in stored.values()]
    assert kinds.count("I8") > 30
    assert kinds.count("I8") == kinds.count("F32"), "one tensor of scales for each"
    assert unet.at("bf16") is unet


def test_the_same_graph_on_two_engines(quantised, rng):
    """Different kernels, one meaning: they agree far better than int8 agrees with float."""
    unet = quantised[0].components["unet"]
    given = feeds(rng)
    dims = {"B": 2, "T": 77, "h": 16, "w": 16}
    ov, ort = OpenVINO(Store(limit=0)), OnnxRuntime()
    float32 = ov.load(unet, Profile(dims, "f32", 1))(given)["out_sample"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVINO, "_hint", lambda *_: "f32")
        one = ov.load(unet, Profile(dims, "int8", 1))(given)["out_sample"]
    two = ort.load(unet, Profile(dims, "int8", 1))(given)["out_sample"]
    apart = distance(float32, one).psnr_db
    assert 25 < apart < 60, "less is broken, more is not int8"
    assert distance(one, two).psnr_db > apart + 3


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_a_map_is_convolved_before_it_is_enlarged(name, tmp_path, rng):
    """Four kernels of sums, rounded once: such a twin is as far from float as a whole one."""
    component = open_bundle(api.find_model("emoji")).components[name]
    found = layers(ir.load(component.graphs["full"].path))
    ends = ("upsample.conv/Conv", ".1.conv/Conv", ".2.conv/Conv")
    behind = [la for la in found if la.name.endswith(ends)]
    chosen = quantize.Choice({la.name: (Grid(WIDE[name] / 255, 128),) for la in behind})
    split = quantize.write_twin(component, tmp_path / "split", chosen)
    whole = quantize.write_twin(component, tmp_path / "whole", chosen, small_maps=False)
    sizes = {n: t.shape for n, t in read_header(component.weights).items()}
    by = {la.name: np.linspace(0.8, 1.2, sizes[la.weight][1], dtype=np.float32) for la in behind}
    divided = quantize.write_twin(
        component, tmp_path / "divided", quantize.Choice(chosen.grids, by)
    )
    kinds = [node.op_type for node in ir.load(split.graphs["full"].path).graph]
    assert kinds.count("DepthToSpace") == 3
    assert "Resize" not in kinds
    stored = read_header(split.weights)
    places = tuple(f".weight/{row}{column}" for row in "01" for column in "01")
    parts = [n for n in stored if n.endswith(places)]
    assert len(parts) == 12
    assert all(stored[n].dtype == "I8" and stored[n].shape[2:] == (2, 2) for n in parts)
    assert not {n.rpartition("/")[0] for n in parts} & set(stored), "not the whole ones too"

    dims = {"B": 1, "T": 77, "h": 8, "w": 8}
    shapes = {t.name: t.resolve(dims) for t in component.graphs["full"].inputs}
    given = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    given |= {n: np.full(s, 400, np.float32) for n, s in shapes.items() if n == "timestep"}

    def ran(component, precision):
        graph = component.graphs["full"]
        wanted = {d: n for d, n in dims.items() if any(d in t.shape for t in graph.inputs)}
        network = OnnxRuntime().compile(component, graph, Profile(wanted, precision, 1))
        return next(iter(network.open({})(given).values()))

    floats = ran(component, "f32")
    lost = [np.square(ran(twin, "int8") - floats).mean() for twin in (split, whole)]
    assert 0 < lost[0] < 1.5 * lost[1], lost
    for twin in (split, divided):  # what adds up before them, OpenVINO must not keep in float32
        run = OpenVINO(Store(limit=0)).compile(twin, twin.graphs["full"], Profile(dims, "int8", 1))
        seen = next(iter(run.open({})(given).values()))
        assert np.square(seen - floats).mean() < 2 * lost[0]


@pytest.mark.parametrize("limit", [0, None], ids=["not kept", "kept"])
def test_weights_over_our_mapping_give_the_same_bit_for_bit(
    limit, quantised, rng, tmp_path, monkeypatch
):
    """As those of large networks are read; here of a small one."""
    twin = quantised[0].components["unet"].at("int8")
    profile, values = Profile({"B": 2, "h": 16, "w": 16}, "int8"), feeds(rng)
    plain = OpenVINO(Store(tmp_path / "a", limit=0)).load(twin, profile)(values)
    done = []

    def always(model, weights):
        done.append(remap(model, weights, large=1))
        return done[-1]

    monkeypatch.setattr("sdengine.backends.openvino.remap", always)
    ours = OpenVINO(Store(tmp_path / "b", limit=limit)).load(twin, profile)(values)
    assert done
    assert None not in done
    for name, result in plain.items():
        np.testing.assert_array_equal(ours[name], result)


def test_layers_do_run_in_int8(quantised):
    """OpenVINO says in what it computes."""
    unet = quantised[0].components["unet"]
    session = OpenVINO(Store(limit=0)).load(
        unet, Profile({"B": 2, "T": 77, "h": 16, "w": 16}, "int8", 1)
    )
    model = session.graph("full")._network.part("full")._compiled.get_runtime_model()
    nodes = [op.get_rt_info() for op in model.get_ops()]
    kinds = [(i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in nodes]
    products = [p for kind, p in kinds if kind in ("Convolution", "FullyConnected")]
    assert sum(p in ("i8", "u8") for p in products) > len(products) / 2, products


def test_a_picture(quantised):
    with api.load(quantised[0].path, precision="int8", backend="openvino") as pipeline:
        picture = pipeline(prompt="a fox", seed=1, steps=3).image
    with api.load(quantised[0].path, precision="f32", backend="openvino") as pipeline:
        other = pipeline(prompt="a fox", seed=1, steps=3).image
    assert picture.size == other.size
    assert np.asarray(picture).tolist() != np.asarray(other).tolist()


def test_a_broken_graph_is_refused(mini_bundle, tmp_path, monkeypatch):
    """Grids so narrow that most of an activation is cut off."""
    path = tmp_path / "mini"
    shutil.copytree(mini_bundle, path)
    monkeypatch.setattr(quantize, "FLOOR_DB", -np.inf)
    monkeypatch.setattr(quantize, "fitting", lambda *_: Fit(None, Grid(1e-4), 0))
    with pytest.raises(
        ParityFailure, match=r"unet on openvino in int8, .*required: PSNR 25 dB"
    ) as e:
        add_target(path, ["openvino"], ["int8"], prompts=PROMPTS[:1])
    assert "sdengine.export.repro" in e.value.hint
    bundle = open_bundle(path)
    assert "int8" not in bundle.targets["openvino"].precisions
    assert bundle.components["unet"].quantised == {}


def test_asked_for_without_it(mini_bundle):
    with pytest.raises(RequestError) as e:
        api.load(mini_bundle, precision="int8", backend="openvino")
    command = f"sdengine export {mini_bundle} --target openvino --precision int8"
    assert command in e.value.hint


# The strict reader


def edited(quantised, tmp_path, change):
    path = tmp_path / "edited"
    shutil.copytree(quantised[0].path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["components"]["unet"]["quantised"])
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def rename(graphs, name):
    graphs["other"] = graphs.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["int8"].update(source="0" * 64), "unet.quantised.int8.source"),
        (lambda q: rename(q["int8"]["graphs"], "prologue"), "unet.quantised.int8.graphs"),
        (lambda q: q["int8"].pop("recipe"), "unet.quantised.int8"),
        (lambda q: q.update(bf16=q.pop("int8")), "unet.quantised"),
        (
            lambda q: q["int8"]["graphs"]["full"]["outputs"][0].update(name="other"),
            "unet.quantised.int8.graphs.full.outputs",
        ),
    ],
)
def test_what_the_reader_refuses(quantised, tmp_path, change, message):
    with pytest.raises(BadManifest, match=message) as e:
        open_bundle(edited(quantised, tmp_path, change))
    assert "export" in e.value.hint


# Rounding


def test_weights_round_as_torch_does(rng):
    import torch

    weight = rng.standard_normal((5, 3, 2, 2)).astype(np.float32)
    weight[3] = 0
    steps, scale = rounded_weight(weight)
    assert steps.dtype == np.int8
    wanted = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weight), torch.from_numpy(scale), torch.zeros(5, dtype=torch.int32), 0,
        -127, 127,
    ).numpy()  # fmt: skip
    np.testing.assert_allclose(steps * scale.reshape(-1, 1, 1, 1), wanted, atol=1e-7)
    assert np.abs(steps * scale.reshape(-1, 1, 1, 1) - weight).max() <= scale.max() / 2 + 1e-7


def one_channel(values) -> Seen:
    column = np.asarray(values, np.float32).reshape(-1, 1)
    return Seen(column.min(axis=0), column.max(axis=0), column)


def error(seen: Seen, chosen: Grid) -> float:
    zero, ends = (0, (-127, 127)) if chosen.zero is None else (chosen.zero, (0, 255))
    steps = np.clip(np.rint(seen.values / chosen.scale) + zero, *ends)
    return float(np.mean(((steps - zero) * chosen.scale - seen.values) ** 2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_evenly_spread_values_use_the_whole_grid(symmetric):
    """Rounding error of an even density: step squared / 12 (Bennett 1948)."""
    seen = one_channel(np.linspace(-1, 3, 20001))
    chosen = grid(seen, symmetric=symmetric)
    step = 3 / 127 if symmetric else 4 / 255
    assert chosen.scale == pytest.approx(step, rel=0.05)
    assert error(seen, chosen) == pytest.approx(step**2 / 12, rel=0.15)


def test_a_rare_outlier_is_cut(rng):
    seen = one_channel(np.append(rng.standard_normal(60_000), 60))
    chosen = grid(seen, symmetric=True)
    assert chosen.scale * 127 < 55
    assert error(seen, chosen) < error(seen, Grid(60 / 127))


def test_nothing_seen_but_zero():
    assert grid(one_channel(np.zeros(9)), symmetric=True).scale == 1.0
    empty = Seen(np.zeros(3, np.float32), np.zeros(3, np.float32), np.zeros((9, 3), np.float32))
    found = fit(empty, [np.ones((2, 3), np.float32)], symmetric=True)
    assert found.divisors is None
    assert found.noise == 0


def through_int8(x, weight, found: Fit):
    """The layer as engines compute it, in float64; torch rounds."""
    import torch

    by = np.ones(x.shape[1], np.float32) if found.divisors is None else found.divisors
    zero, ends = (0, (-127, 127)) if found.grid.zero is None else (found.grid.zero, (0, 255))
    x8 = torch.fake_quantize_per_tensor_affine(
        torch.from_numpy(x / by), found.grid.scale, zero, *ends
    ).double().numpy()  # fmt: skip
    steps, scale = rounded_weight(weight * by)
    return x8 @ (steps * scale[:, None].astype(np.float64)).T


def test_one_loud_channel_does_not_drown_the_others(rng):
    """Divided, its noise goes into the weight; what `fit` promises is what the layer loses."""
    x = rng.standard_normal((4000, 48)).astype(np.float32)
    x[:, 7] *= 40
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    weight[:, 7] /= 40
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    seen = Seen(x.min(axis=0), x.max(axis=0), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdengine.export.smooth.STRENGTHS", (0.0,))
        plain = fit(seen, [weight], symmetric=True)
    found = fit(seen, [weight], symmetric=True)
    lost = [
        np.mean((through_int8(x, weight, f) - exact) ** 2) / np.mean(exact**2)
        for f in (plain, found)
    ]
    assert lost[1] < lost[0] / 15
    assert found.noise == pytest.approx(lost[1], rel=0.25)
    assert plain.noise == pytest.approx(lost[0], rel=0.25)


def test_a_channel_that_was_quiet_may_wake(rng):
    """Another prompt brings it to a tenth of the loudest: its divisor must not have been so small
    that the grid cuts it."""
    x = rng.standard_normal((4000, 48)).astype(np.float32)
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    x[:, :24] /= 50
    weight[:, :24] *= 50
    found = fit(Seen(x.min(axis=0), x.max(axis=0), x), [weight], symmetric=True, shares=(1.0,))
    x[:, 7] *= 5
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    lost = np.mean((through_int8(x, weight, found) - exact) ** 2) / np.mean(exact**2)
    assert lost < 0.01, "0.07 where quiet channels are divided by what was seen of them alone"


def test_a_linear_layers_grid_covers_what_was_seen(rng):
    """Where the grid of least error would cut a rare value."""
    x = np.append(rng.standard_normal(60_000), 60).astype(np.float32)[:, None]
    seen = Seen(x.min(axis=0), x.max(axis=0), x)
    layer = Layer("a", "MatMul", "a.weight", ("x",))
    found = quantize.fitting(layer, seen, [np.ones((4, 1), np.float32)])
    by = 1.0 if found.divisors is None else found.divisors[0]
    assert found.grid.scale * 127 * by == pytest.approx(60, rel=1e-3)


# The search


def test_gates_turn_the_rounding_on_and_off(quantised, rng, tmp_path):
    """All off is the float graph, all on the int8 one: in ONNX Runtime, which did not make them."""
    import onnxruntime

    unet = quantised[0].components["unet"]
    full, twin = unet.graphs["full"], unet.at("int8")
    (tmp_path / "int8").mkdir()
    shutil.copy(unet.weights, tmp_path / unet.weights.name)
    shutil.copy(twin.weights, tmp_path / "int8" / twin.weights.name)
    shutil.copy(twin.graphs["full"].path, tmp_path / "int8" / "full.onnx")
    shutil.copy(full.path, tmp_path / "full.onnx")
    order = [la for la in layers(ir.load(full.path)) if la.weight is not None]
    stored = read_header(twin.weights)
    computed = {la.name for la in order if stored[la.weight].dtype == "I8"}
    model = gated(
        ir.load(full.path),
        {la.name: (Grid(0.03),) for la in order},
        stored,
        location="int8/weights.safetensors",
        order=order,
        divisors={},
    )
    save(model, tmp_path / "gated.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    dims = {"B": 1, "T": 77, "h": 16, "w": 16}
    given = {t.name: rng.standard_normal(t.resolve(dims)).astype(np.float32) for t in full.inputs}

    def run(path, **more):
        session = onnxruntime.InferenceSession(str(path), options)
        return session.run(["out_sample"], {**given, **more})[0]

    gates = np.zeros(2 * len(order), np.float32)
    plain = run(tmp_path / "full.onnx")
    np.testing.assert_allclose(run(tmp_path / "gated.onnx", **{GATES: gates}), plain, atol=1e-4)
    gates[0] = 1
    one = np.abs(run(tmp_path / "gated.onnx", **{GATES: gates}) - plain).max()
    gates[:] = 0
    gates[1::2] = [layer.op == "MatMul" and layer.name in computed for layer in order]
    linear = np.abs(run(tmp_path / "gated.onnx", **{GATES: gates}) - plain).max()
    assert linear > 1e-4, "the weights of linear layers have gates too"
    gates[:] = 1
    every = np.abs(run(tmp_path / "gated.onnx", **{GATES: gates}) - plain).max()
    assert 1e-4 < one < every


def test_the_rule_on_the_embedded_network():
    """The picture's own ends, not the time's; the ends of each level; little of all arithmetic."""
    unet = open_bundle(api.find_model("emoji")).components["unet"]
    found = quantize.products(unet.graphs["full"])
    every = quantize.Choice({la.name: (Grid(1.0),) for la in found})
    floats = {la.name for la in found} - set(quantize.by_rule(unet, every).grids)
    assert {"input_blocks.0.0/Conv", "out.2/Conv"} < floats
    assert "input_blocks.7.1.transformer_blocks.0.attn2/MatMul" in floats
    second = "transformer_blocks.0.ff.net.2/MatMul"
    assert {f"output_blocks.{b}.1.{second}" for b in range(3, 12)} < floats
    assert not {f"input_blocks.{b}.1.{second}" for b in (1, 2, 4, 5, 7, 8)} & floats
    assert {f"output_blocks.{b}.1.proj_in/MatMul" for b in (5, 11)} < floats
    assert "output_blocks.7.1.proj_in/MatMul" not in floats
    dims = {"B": 2, "T": 77, "h": 16, "w": 16}
    counted = by_node(ir.load(unet.graphs["full"].path), dims)
    left = sum(n for name, n in counted.items() if name in floats)
    assert 0.15 < left / sum(counted.values()) < 0.25


def recipes(path):
    manifest = json.loads((path / "manifest.json").read_text())
    return {n: c["quantised"]["int8"]["recipe"] for n, c in manifest["components"].items()}


def test_a_search_and_a_decoder_that_loses_too_much(quantised, mini_bundle, tmp_path, monkeypatch):
    """Measured, other layers stay in float than by rule; a decoder under its limit stays whole."""
    path = tmp_path / "mini"
    shutil.copytree(mini_bundle, path)
    monkeypatch.setattr(quantize, "LEAST_DB", {"vae_decoder": 200.0})
    add_target(path, ["openvino"], ["int8"], prompts=PROMPTS[:1], search_s=20.0)
    found, ruled = recipes(path), recipes(quantised[0].path)
    assert found["unet"]["int8_layers"] > 20
    assert set(found["unet"]["float_layers"]) != set(ruled["unet"]["float_layers"])
    assert found["vae_decoder"]["int8_layers"] == 0 < ruled["vae_decoder"]["int8_layers"]
    assert found["text_encoder"]["int8_layers"] == 0, "its weights alone are int8"
    assert not (path / "unet" / search.GATED).exists()


def test_worst_keeps_to_its_share():
    noise = search.Noise({"a": 8.0, "b": 4.0, "c": 1.0, "d": 0.9}, 14.0)
    macs = {"a": 50, "b": 10, "c": 2, "d": 38}
    assert search.worst(noise, macs, 0.15) == ["c", "b"]
    assert search.worst(noise, macs, 0.7) == ["c", "b", "a"]
    assert search.worst(noise, macs, 0.0) == []


# The calibration file


def test_prompts_are_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\na fox\n  ein Häuschen \n", encoding="utf-8")
    assert read_prompts(file) == ("a fox", "ein Häuschen")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\n# nothing\n", "no prompt in it"),
        (b"a fox\n\xff\xfe", "not UTF-8 text, from byte 6 on"),
        (b"a fox\n" * 33, "33 prompts; at most 32"),
        (b"x" * 2001, "a prompt of 2001 characters"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=message) as e:
        read_prompts(file)
    assert "prompt" in e.value.hint
