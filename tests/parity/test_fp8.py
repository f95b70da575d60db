"""fp8: numbers as torch's float8 has them, grids that reach 448, networks near torch in float32."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdengine.engine.bundle import open_bundle
from sdengine.engine.tokenizer import Tokenizer
from sdengine.engine.weights import read_header
from sdengine.export import add_nvidia, nvidia
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.components import parts
from sdengine.export.containers import open_container
from sdengine.export.graph.quantize import E4M3, Grid, rounded_weight
from sdengine.export.observe import Seen, grid, rounding_error
from sdengine.export.parity import GATES, judge
from sdengine.export.quantize import fp8_choices
from sdengine.export.record import PROMPTS, record
from sdengine.export.targets.tensorrt import Emulated
from sdengine.export.typed import write_typed

pytestmark = [pytest.mark.export, pytest.mark.ort, pytest.mark.ov]

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji"
F8 = torch.float8_e4m3fn


def torch_rounds(values):
    """Saturating: torch's own conversion makes NaN of what is beyond 448."""
    return torch.from_numpy(np.clip(values, -448, 448)).to(F8).float().numpy()


def test_steps_are_torchs_float8(rng):
    values = np.concatenate([
        (rng.normal(size=4000) * 10.0 ** rng.uniform(-4, 3, size=4000)),
        [0.0, 448.0, 449.0, -1e9, 2.0**-9, 2.0**-10, 1.0625, 17.0],
    ]).astype(np.float32)  # fmt: skip
    found = E4M3.of(values).astype(np.float32)
    np.testing.assert_array_equal(found, torch_rounds(values))
    np.testing.assert_array_equal(rounding_error(values, Grid(1.0, None, E4M3)), found - values)


def test_a_weights_largest_goes_to_448(rng):
    weight = (rng.normal(size=(6, 5, 3, 3)) * 10.0 ** rng.uniform(-3, 2, (6, 1, 1, 1))).astype(
        np.float32
    )
    steps, scale = rounded_weight(weight, E4M3)
    largest = np.abs(weight).reshape(6, -1).max(1)
    np.testing.assert_allclose(scale, largest / 448, rtol=1e-6)
    assert (np.abs(steps.astype(np.float32)).reshape(6, -1).max(1) == 448).all()
    error = np.abs(steps.astype(np.float32) * scale.reshape(6, 1, 1, 1) - weight)
    # half of the last of four significant bits, or of the finest step below 2^-6
    assert (error <= np.maximum(np.abs(weight) / 16, scale.reshape(6, 1, 1, 1) * 2.0**-10)).all()


def test_a_grid_reaches_as_far_as_what_was_seen(rng):
    values = rng.normal(size=(2000, 4)).astype(np.float32)
    values[7, 1] = 300.0  # far out: a floating point loses nothing by keeping it
    seen = Seen(values.min(0), values.max(0), values)
    found = grid(seen, symmetric=True, steps=E4M3)
    assert found == Grid(float(np.float32(300 / 448)), None, E4M3)
    assert grid(Seen(*np.zeros((2, 4)), np.zeros((9, 4))), symmetric=True, steps=E4M3).scale == 1.0


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(the bundle, its recorded cases, what is rounded, a folder with its weights)"""
    folder = tmp_path_factory.mktemp("fp8") / "emoji"
    shutil.copytree(EMBEDDED, folder)
    bundle = open_bundle(folder)
    tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
    ids = np.array([tokenizer.encode(p).ids for p in PROMPTS], np.int64)
    described = parts(bundle.facts, open_checkpoint(bundle.path).configs, ())
    weights = {n: c.weights for n, c in bundle.components.items()}
    cases = record(described, weights, bundle.facts, ids, lambda text, share: None)
    choices = fp8_choices(bundle, ["a red fox"], cases, lambda text, share: None)
    return bundle, cases, choices, folder


def only_full(component):
    graphs = {n: g for n, g in component.graphs.items() if n in ("prologue", "full")}
    return component.__class__(**{**vars(component), "graphs": graphs})


# What this machine measured (38, 36 dB) less 2: the gate itself is 30.
@pytest.mark.parametrize(("name", "least_db"), [("unet", 36), ("vae_decoder", 34)])
def test_a_network_of_the_embedded_model(embedded, name, least_db):
    bundle, cases, choices, folder = embedded
    component, choice = only_full(bundle.components[name]), choices[name]
    written = write_typed(component, bundle.path, folder, "fp8", choice)
    records = judge(
        written.component, Emulated(), "fp8", cases[name][:1], GATES["fp8"],
        keep=lambda *a: pytest.fail(f"{name} misses {GATES['fp8']}"),
    )  # fmt: skip
    worst = min(r.psnr_db for r in records)
    assert least_db < worst < 55, "55: it was not rounded"
    assert written.recipe["fp8_layers"] == len(choice.grids) > 30
    assert not choice.divisors

    model = ir.load(written.component.graphs["full"].path)
    steps = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert steps
    for node in steps:
        assert node.outputs[0].dtype == node.inputs[2].dtype == ir.DataType.FLOAT8E4M3FN
        assert node.inputs[0].dtype == node.inputs[1].dtype == ir.DataType.FLOAT16

    assert written.component.weights.name == "weights.fp8.safetensors"
    stored = read_header(written.component.weights)
    eighths = [n for n, s in stored.items() if s.dtype == "F8_E4M3"]
    origin = open_container(component.weights).tensors
    made = open_container(written.component.weights).tensors
    assert len(eighths) > 30
    for key in eighths[:5]:
        weight = origin[key].torch().float()
        scale = weight.abs().reshape(len(weight), -1).amax(1) / 448
        scale[scale == 0] = 1  # idle blocks of this model
        wide = scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert torch.equal(made[key].torch().float(), (weight / wide).to(F8).float())
        torch.testing.assert_close(made[key + ".scale"].torch(), scale)
    rest = [n for n in origin if n not in eighths]
    assert all(made[n].numpy_bytes() == origin[n].numpy_bytes() for n in rest)


def test_a_bundle_gets_fp8(mini_bundle, tmp_path, caplog, monkeypatch):
    """All networks are there; one whose pictures would show it computes in float16 instead."""
    caplog.set_level(logging.INFO, "sdengine.export")
    monkeypatch.setitem(nvidia.LEAST_DB, "vae_decoder", 99.0)
    shutil.copytree(mini_bundle, tmp_path / "mini")
    add_nvidia(tmp_path / "mini", ["trt"], ["fp8"], prompts=["a fox"])
    bundle = open_bundle(tmp_path / "mini", verify=True)
    assert set(bundle.targets["trt"].precisions) >= {"fp8"}
    found = {n: c.typed["fp8"] for n, c in bundle.components.items()}
    assert found["unet"].weights.name == "weights.fp8.safetensors"
    kinds = {n: {s.dtype for s in read_header(c.weights).values()} for n, c in found.items()}
    assert {n for n, kind in kinds.items() if "F8_E4M3" in kind} == {"unet"}
    assert "vae_decoder computes in float16: 99 dB are due" in caplog.text
    assert not (tmp_path / "mini" / "vae_decoder" / "weights.fp8.safetensors").exists()
    assert {p.gate for p in bundle.parity if p.precision == "fp8"} == {"PSNR 30 dB"}
