"""Strongly typed graphs: types where they belong, roundings as numpy has them, parity with torch.

float16 and bfloat16 references are numpy's and ml_dtypes'; networks are compared with torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import ExportError, TraceError
from sdengine.engine.spec import Profile
from sdengine.engine.tokenizer import Tokenizer
from sdengine.engine.weights import read_header
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.components import parts
from sdengine.export.graph.emulate import emulated
from sdengine.export.graph.typed import BF16, F16, F32, typed
from sdengine.export.parity import GATES, distance, judge
from sdengine.export.record import PROMPTS, record
from sdengine.export.targets.tensorrt import Emulated
from sdengine.export.typed import write_typed

pytestmark = [pytest.mark.export, pytest.mark.ort]

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji"
HALVES = {"f16": (F16, np.float16), "bf16": (BF16, ml_dtypes.bfloat16)}


def graph(nodes, inputs, outputs, constants=()) -> ir.Model:
    """A model of float32 tensors: name -> shape."""
    values = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in tensors.items()]
              for tensors in (inputs, outputs))  # fmt: skip
    made = helper.make_graph(
        [helper.make_node(op, i, o, name=o[0], **a) for op, i, o, a in nodes],
        "g",
        *values,
        [numpy_helper.from_array(v, n) for n, v in dict(constants).items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, **feeds):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, feeds)


def types(model: ir.Model) -> dict[str, ir.DataType]:
    return {str(v.name): v.dtype for node in model.graph for v in node.outputs}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ATTENTION = [
    ("Mul", ["q", "scale"], ["scaled"], {}),
    ("Transpose", ["k"], ["kt"], {"perm": [0, 2, 1]}),
    ("MatMul", ["scaled", "kt"], ["scores"], {}),
    ("Add", ["scores", "mask"], ["masked"], {}),
    ("Softmax", ["masked"], ["p"], {"axis": -1}),
    ("MatMul", ["p", "v"], ["y"], {}),
]


def attention(width: int = 64) -> ir.Model:
    shape = {n: ["B", "T", width] for n in "qkv"}
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    constants = {"scale": np.float32(width**-0.5), "mask": mask}
    return graph(ATTENTION, shape, {"y": ["B", "T", width]}, constants)


@pytest.mark.parametrize("precision", HALVES)
def test_attention_is_half_but_for_its_scores(precision):
    half, _ = HALVES[precision]
    model = typed(attention(), half).model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = types(model)
    assert found["scores"] == half
    assert found["masked"] == found["p"] == F32
    assert [v.dtype for v in model.graph.inputs] == [F32] * 3
    assert [(str(v.name), v.dtype) for v in model.graph.outputs] == [("y", F32)]


@pytest.mark.parametrize("precision", HALVES)
def test_an_emulated_attention_rounds_as_numpy_does(precision, rng):
    half, dtype = HALVES[precision]
    q, k, v = (rng.normal(size=(1, 8, 64)).astype(np.float32) for _ in "qkv")

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    scaled = rounded(rounded(q) * rounded(np.float32(64**-0.5)))
    scores = rounded(scaled @ rounded(k).transpose(0, 2, 1))
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    expected = rounded(rounded(softmax(scores + mask)) @ rounded(v))
    (found,) = run(emulated(typed(attention(), half).model), q=q, k=k, v=v)
    # sums in another order may land on the other side of a rounding, here and there
    assert np.mean(found == expected) > 0.9
    assert distance(expected, found).psnr_db > {"f16": 75, "bf16": 57}[precision]


def test_what_overflows_float16_is_seen(rng):
    """500 * 500, twice: beyond 65504. A processor that computes in float32 would hide it."""
    model = graph(
        [("MatMul", ["a", "b"], ["m"], {}), ("Relu", ["m"], ["y"], {})],
        {"a": [2, 2], "b": [2, 2]}, {"y": [2, 2]},
    )  # fmt: skip
    x = np.full((2, 2), 500, np.float32)
    assert np.isinf(run(emulated(typed(model, F16).model), a=x, b=x)[0]).all()
    assert np.isfinite(run(emulated(typed(model, BF16).model), a=x, b=x)[0]).all()


NORM = [
    ("Reshape", ["x", "groups"], ["g"], {}),
    ("InstanceNormalization", ["g", "ones", "zeros"], ["n"], {"epsilon": 1e-5}),
    ("Shape", ["x"], ["s"], {}),
    ("Reshape", ["n", "s"], ["r"], {}),
    ("Mul", ["r", "weight"], ["w"], {}),
    ("Sigmoid", ["w"], ["i"], {}),
    ("Mul", ["w", "i"], ["a"], {}),
    ("Conv", ["a", "kernel"], ["y"], {"kernel_shape": [1, 1]}),
]


@pytest.mark.parametrize("largest", [30.0, 3000.0])
def test_norms_of_large_activations_stay_finite(largest, rng):
    """Sums of squares over a group are far beyond 65504: statistics are float32."""
    x = (largest * rng.uniform(-1, 1, size=(1, 8, 64, 64))).astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.isinf((x.astype(np.float16) ** 2).sum(dtype=np.float16))  # what half would do
    weight = rng.normal(size=(8, 1, 1)).astype(np.float32)
    kernel = rng.normal(size=(4, 8, 1, 1)).astype(np.float32)
    constants = {
        "groups": np.array([0, 2, -1], np.int64),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "weight": weight,
        "kernel": kernel,
    }
    model = graph(NORM, {"x": ["B", 8, "h", "w"]}, {"y": ["B", 4, "h", "w"]}, constants)
    made = typed(model, F16).model
    found = types(made)
    assert {found[n] for n in "gnrwia"} == {F32}
    g = x.astype(np.float64).reshape(1, 2, -1)
    n = ((g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-5)).reshape(
        x.shape
    )
    w = n * weight
    expected = np.einsum("oc,bchw->bohw", kernel[:, :, 0, 0], w / (1 + np.exp(-w)))
    assert distance(expected, run(emulated(made), x=x)[0]).psnr_db > 65


def test_the_time_branch_is_float32_but_for_its_products(rng):
    nodes = [
        ("Mul", ["timestep", "f"], ["angle"], {}),
        ("Cos", ["angle"], ["c"], {}),
        ("MatMul", ["c", "m"], ["e"], {}),
        ("Add", ["e", "b"], ["emb"], {}),
        ("Add", ["sample", "emb"], ["y"], {}),
    ]
    constants = {n: rng.normal(size=s).astype(np.float32)
                 for n, s in (("f", (8,)), ("m", (8, 8)), ("b", (8,)))}  # fmt: skip
    model = graph(nodes, {"timestep": [1, 1], "sample": [1, 8]}, {"y": [1, 8]}, constants)
    found = types(typed(model, F16).model)
    assert found["angle"] == found["c"] == found["emb"] == F32
    assert found["e"] == F16
    # 999 and 998 differ in float32 and are one number in bfloat16
    angles = [run(emulated(typed(model, BF16).model), timestep=np.array([[t]], np.float32),
                  sample=np.zeros((1, 8), np.float32))[0] for t in (999.0, 998.0)]  # fmt: skip
    assert np.abs(angles[0] - angles[1]).max() > 0.1


def test_a_grid_with_a_zero_point_becomes_one_about_zero(rng):
    """TensorRT knows no zero point: -0.25..2.30 in uint8 (scale 0.01, zero 25) becomes int8 with
    scale 2.30 / 127."""
    nodes = [
        ("QuantizeLinear", ["x", "scale", "zero"], ["q"], {}),
        ("DequantizeLinear", ["q", "scale", "zero"], ["d"], {}),
        ("MatMul", ["d", "m"], ["y"], {}),
    ]
    constants = {
        "scale": np.float32(0.01),
        "zero": np.uint8(25),
        "m": np.eye(4, dtype=np.float32),
    }
    made = typed(graph(nodes, {"x": [2, 4]}, {"y": [2, 4]}, constants), F16).model
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert types(made)["q"] == ir.DataType.INT8
    assert types(made)["d"] == F16
    x = rng.uniform(-0.25, 2.3, size=(2, 4)).astype(np.float32)
    step = 2.3 / 127
    (found,) = run(emulated(made), x=x)
    assert np.abs(found - np.rint(x / step) * step).max() < 0.002
    assert np.abs(found - x).max() <= step / 2 + 0.002


def test_an_operator_without_a_rule_is_refused():
    model = graph([("Erf", ["x"], ["y"], {})], {"x": [2]}, {"y": [2]})
    with pytest.raises(TraceError, match="no rule for the precision of Erf") as caught:
        typed(model, F16)
    assert "export/graph/typed.py" in caught.value.hint


# Networks against torch


def recorded(bundle):
    described = parts(bundle.facts, open_checkpoint(bundle.path).configs, ())
    tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
    ids = np.array([tokenizer.encode(p).ids for p in PROMPTS], np.int64)
    weights = {n: c.weights for n, c in bundle.components.items()}
    return record(described, weights, bundle.facts, ids, lambda text, share: None)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(the bundle, its recorded cases, a folder with its weights)"""
    folder = tmp_path_factory.mktemp("typed") / "emoji"
    shutil.copytree(EMBEDDED, folder)
    bundle = open_bundle(folder)
    return bundle, recorded(bundle), folder


def only_full(component):
    graphs = {n: g for n, g in component.graphs.items() if n in ("prologue", "full")}
    return component.__class__(**{**vars(component), "graphs": graphs})


def judged(component, cases, precision):
    refused = judge(
        component, Emulated(), precision, cases, GATES[precision],
        keep=lambda *a: pytest.fail(f"{component.spec.name} misses {GATES[precision]}"),
    )  # fmt: skip
    return min(r.psnr_db for r in refused)


# What this machine measured less 5 dB: a rounding too many costs more.
LEAST_DB = {
    "f16": {"text_encoder": 77, "unet": 68, "vae_encoder": 77, "vae_decoder": 76},
    "bf16": {"text_encoder": 58, "unet": 50, "vae_encoder": 58, "vae_decoder": 56},
}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", LEAST_DB["f16"])
def test_a_network_of_the_embedded_model(embedded, name, precision):
    bundle, cases, folder = embedded
    written = write_typed(only_full(bundle.components[name]), bundle.path, folder, precision)
    chosen = cases[name][:1]
    assert judged(written.component, chosen, precision) > LEAST_DB[precision][name]
    changed = precision == "bf16"  # the checkpoint is float16
    assert (written.component.weights.name != "weights.safetensors") == changed
    stored = {s.dtype for s in read_header(written.component.weights).values()}
    assert stored == ({"BF16", "F16"} if changed else {"F16"})


def test_inputs_many_times_the_recorded_ones_stay_finite(embedded):
    """The latent eight times as large as it ever was, the text four times: no NaN, no infinity."""
    bundle, cases, folder = embedded
    unet = only_full(bundle.components["unet"])
    written = write_typed(unet, bundle.path, folder, "f16")
    case = cases["unet"][0]
    session = Emulated().load(written.component, Profile(case.dims(unet.spec), "f16"))
    large = {**case.feeds, "sample": 8 * case.feeds["sample"],
             "encoder_hidden_states": 4 * case.feeds["encoder_hidden_states"]}  # fmt: skip
    assert np.isfinite(session(large)["out_sample"]).all()
    session.close()


# variant -> its networks: class labels are int64, float32; the x4 upscaler's VAE is of factor 4
PARTS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
VARIANTS = {
    "inpainting": PARTS,
    "depth": {*PARTS, "depth"},
    "x4-upscaler": PARTS,
    "unclip-h": {*PARTS, "image_encoder"},
    "unclip-l": {*PARTS, "image_encoder"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_network_of_the_variants(variant_bundle, tmp_path, variant):
    folder = tmp_path / "b"
    shutil.copytree(variant_bundle(variant), folder)
    bundle = open_bundle(folder)
    cases = recorded(bundle)
    assert set(bundle.components) == VARIANTS[variant]
    for name, component in bundle.components.items():
        written = write_typed(only_full(component), bundle.path, folder, "f16")
        assert judged(written.component, cases[name][:1], "f16") > 40, name


def test_int8_needs_a_quantised_network(embedded):
    bundle, _, folder = embedded
    with pytest.raises(ExportError, match="no quantised network") as caught:
        write_typed(bundle.components["unet"], bundle.path, folder, "int8")
    assert "--precision int8" in caught.value.hint


def test_float32_weights_become_a_second_file(mini_bundle, tmp_path):
    """Of a checkpoint in float32: products in float16, rounded to nearest; norms as they were."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(mini_bundle, tmp_path / "b")
    component = open_bundle(tmp_path / "b").components["text_encoder"]
    wide = {
        n: v.astype(np.float32) + np.float32(1e-4) for n, v in load_file(component.weights).items()
    }
    save_file(wide, component.weights)
    written = write_typed(component, tmp_path / "b", tmp_path / "b", "f16")
    assert written.component.weights.name == "weights.f16.safetensors"
    found = load_file(written.component.weights)
    halved = {n for n, v in found.items() if v.dtype == np.float16}
    assert all(np.array_equal(found[n], wide[n].astype(np.float16)) for n in halved)
    assert all(np.array_equal(found[n], wide[n]) for n in set(wide) - halved)
    assert all(".ln_" in n for n in set(wide) - halved), set(wide) - halved
