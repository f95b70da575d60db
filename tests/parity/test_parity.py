"""The judge: distances in closed form, gates at their edges, and graphs damaged on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import ParityFailure, SdengineError
from sdengine.export.parity import GATES, Gate, distance, judge, meets
from sdengine.export.record import Case, loaded, run
from sdengine.export.repro import keep_repro, repeat
from sdengine.export.targets import get as get_target

pytestmark = pytest.mark.export


def test_distance_in_closed_form():
    """Range 2, one of 100 values off by 0.2: MSE 4e-4, PSNR 10 log10(4 / 4e-4) = 40 dB."""
    reference = np.linspace(-1, 1, 100)
    candidate = reference.copy()
    candidate[7] += 0.2
    found = distance(reference, candidate)
    assert found.max_abs == pytest.approx(0.2)
    assert found.psnr_db == pytest.approx(40.0)
    assert distance(reference, reference).psnr_db == np.inf


def test_the_peak_is_the_range_of_the_reference():
    reference = np.linspace(0, 50, 11)
    assert distance(reference, reference + 0.5).psnr_db == pytest.approx(40.0)
    assert distance(reference + 1e3, reference + 1e3 + 0.5).psnr_db == pytest.approx(40.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(value):
    reference = np.linspace(-1, 1, 100)
    candidate = reference.copy()
    candidate[0] = value
    found = distance(reference, candidate)
    assert "the candidate has NaN or infinity" in found.fault
    assert not meets(Gate(-1e9), found, reference)
    assert "reference" in distance(candidate, reference).fault


def test_what_is_constant_never_passes():
    flat, varied = np.full(9, 0.25), np.linspace(0, 0.5, 9)
    assert not meets(Gate(-1e9), distance(varied, flat), varied)
    assert not meets(Gate(-1e9), distance(flat, flat), flat)
    assert "constant" in distance(varied, flat).fault


def test_gates_of_the_issue():
    reference = np.random.default_rng(0).normal(size=100_000)
    peak, deviation = np.ptp(reference), reference.std()
    noise = np.where(np.arange(reference.size) % 2, 1.0, -1.0)  # exactly 1 in root mean square
    for precision, decibels in {"f32": 80, "f16": 40, "bf16": 40, "int8": 25}.items():
        at = peak / 10 ** (decibels / 20)
        for factor, passes in ((0.99, True), (1.01, False)):
            found = distance(reference, reference + noise * at * factor)
            assert meets(GATES[precision], found, reference) == passes, precision
    one_off = np.zeros_like(reference)
    for share, passes in ((0.99e-3, True), (1.01e-3, False)):
        one_off[5] = share * deviation
        found = distance(reference, reference + one_off)
        assert found.psnr_db > 100
        assert meets(GATES["f32"], found, reference) == passes


@pytest.fixture(scope="module")
def decoder(mini_bundle):
    return open_bundle(mini_bundle).components["vae_decoder"]


@pytest.fixture(scope="module")
def cases(decoder):
    """Reference: torch, in float32, on the bundle's weights."""
    import torch

    from sdengine.export.modules.vae import PREFIX, VAEConfig, VAEDecoder
    from sdengine.export.weights_file import read_weights

    module = VAEDecoder(VAEConfig.from_dict(decoder.config))
    weights = {n.removeprefix(PREFIX): t.float() for n, t in read_weights(decoder.weights)}
    module.load_state_dict(weights)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image = module(latent).numpy()
    return [Case("noise", {"latent": latent.numpy()}, {"image": image})]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model"


def judged(component, cases, out, gate=GATES["f32"]):
    def keep(*args):
        return keep_repro(out, *args)

    backend = get_target("openvino").backend()
    return judge(component, backend, "f32", cases, gate, stage="", keep=keep)


def damaged(component, folder, how):
    """A copy of the component whose graph `how` has changed."""
    shutil.copytree(component.weights.parent, folder)
    graph = replace(component.graphs["full"], path=folder / "full.onnx")
    model = onnx.load(graph.path, load_external_data=False)
    how(model.graph)
    onnx.save(model, graph.path)
    return replace(
        component, weights=folder / component.weights.name, graphs={"full": graph}, key="damaged"
    )


def shift_one_weight(graph):
    """One 3x3 convolution's kernel, read from 2 bytes further on."""
    weight = next(t for t in graph.initializer if t.name.endswith("mid.block_1.conv1.weight"))
    offset = next(e for e in weight.external_data if e.key == "offset")
    offset.value = str(int(offset.value) + 2)


def negate_one_node(graph, which=0):
    i, node = [(i, n) for i, n in enumerate(graph.node) if n.op_type == "Sigmoid"][which]
    graph.node.insert(i, onnx.helper.make_node("Neg", [node.input[0]], ["negated"]))
    node.input[0] = "negated"


def swap_norm_epsilon(graph):
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("epsilon", 1e-2))


@pytest.mark.ov
def test_sound_graph_passes(decoder, cases, out):
    whole = replace(decoder, graphs={"full": decoder.graphs["full"]})  # its pieces: test_bands.py
    records = judged(whole, cases, out)
    assert [(r.component, r.runtime, r.precision, r.case) for r in records] == [
        ("vae_decoder", "openvino", "f32", "noise")
    ]
    assert records[0].psnr_db > 100
    assert not list(out.parent.iterdir())


@pytest.mark.ov
@pytest.mark.parametrize("how", [shift_one_weight, negate_one_node, swap_norm_epsilon])
def test_damaged_graph_fails_and_can_be_repeated(decoder, cases, out, tmp_path, how):
    broken = damaged(decoder, tmp_path / "broken", how)
    with pytest.raises(ParityFailure, match="vae_decoder on openvino in f32") as error:
        judged(broken, cases, out)
    assert "PSNR 80 dB" in error.value.message
    folder = next(tmp_path.glob("model.parity-vae_decoder-*"))
    assert f"python -m sdengine.export.repro {folder}" in error.value.hint
    with np.load(folder / "reference.npz") as reference:
        assert np.array_equal(reference["image"], cases[0].outputs["image"])
    shutil.rmtree(tmp_path / "broken")  # the folder stands alone
    if how is negate_one_node:
        command = [sys.executable, "-m", "sdengine.export.repro", str(folder)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        assert answer.stdout.startswith("vae_decoder image: max abs ")
        assert "PSNR" in answer.stdout


@pytest.mark.ov
def test_every_graph_is_judged_and_a_bad_one_is_named(mini_bundle, mini_parts, out, tmp_path):
    unet, part = open_bundle(mini_bundle).components["unet"], mini_parts["unet"]
    random = np.random.default_rng(2)
    feeds = {
        t.name: random.standard_normal(t.resolve({"B": 2, "T": 77, "h": 8, "w": 8})).astype(
            np.float32
        )
        for t in unet.spec.inputs
    }
    with loaded(part, unet.weights) as network:
        case = run(part, network, "noise", feeds)
    records = judged(unet, [case], out)
    assert [(r.graph, r.output) for r in records] == [
        ("full", "out_sample"),
        ("deep", "out_sample"),
        ("deep", "features0"),
        ("deep", "features1"),
        ("shallow0", "out_sample"),
        ("shallow1", "out_sample"),
    ]
    folder = tmp_path / "broken"
    shutil.copytree(unet.weights.parent, folder)
    model = onnx.load(folder / "shallow1.onnx", load_external_data=False)
    # The last one: with one channel a group, norms take away all that the time embedding adds.
    negate_one_node(model.graph, which=-1)
    onnx.save(model, folder / "shallow1.onnx")
    graphs = {n: replace(g, path=folder / g.path.name) for n, g in unet.graphs.items()}
    graphs["shallow1"] = replace(graphs["shallow1"], sha256="damaged")
    broken = replace(unet, weights=folder / unet.weights.name, graphs=graphs)
    with pytest.raises(ParityFailure, match="unet/shallow1 on openvino in f32"):
        judged(broken, [case], out)
    folder = next(tmp_path.glob("model.parity-unet-*"))
    (line,) = repeat(folder)
    assert line.startswith("unet out_sample: max abs ")


@pytest.mark.ov
def test_failed_parity_saves_nothing(mini, tmp_path):
    """A gate that no float32 computation can meet."""
    from sdengine.export import export_bundle

    out = tmp_path / "mini"
    with pytest.raises(ParityFailure, match="text_encoder") as error:
        export_bundle(mini, out, gates={"f32": Gate(1000.0)})
    assert "Nothing was saved" in error.value.message
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith("mini.parity-text_encoder-")


def test_missing_engine_is_named_with_its_cure(mini, tmp_path, monkeypatch):
    from sdengine.backends.openvino import OpenVINO
    from sdengine.engine.ports import Probe
    from sdengine.export import export_bundle

    gone = Probe(False, "the package openvino is not installed", "pip install openvino")
    monkeypatch.setattr(OpenVINO, "probe", lambda self: gone)
    with pytest.raises(SdengineError, match="parity cannot be checked on openvino") as error:
        export_bundle(mini, tmp_path / "out")
    assert error.value.hint == "pip install openvino"
    assert not list(tmp_path.iterdir())
