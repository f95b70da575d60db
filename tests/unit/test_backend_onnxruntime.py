"""ONNX Runtime on the handmade network: numbers, threads, and packages that clash."""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata

import numpy as np
import pytest

from sdengine.backends import machine
from sdengine.backends.onnxruntime import OnnxRuntime
from sdengine.engine.errors import BackendError, BackendUnavailable, CorruptPart
from sdengine.engine.spec import Profile, TensorSpec

pytestmark = pytest.mark.ort
onnxruntime = pytest.importorskip("onnxruntime")

DIMS = {"B": 2, "h": 8, "w": 16}


@pytest.fixture
def unet(handmade, tmp_path):
    return handmade.component(tmp_path / "unet")


@pytest.mark.parametrize("dims", [{}, {"B": 2}, DIMS], ids=["free", "batch", "static"])
def test_answers(dims, unet, handmade, rng, capfd):
    feeds = {
        "sample": rng.normal(size=(2, 4, 8, 16)).astype(np.float32),
        "timestep": np.array([1, 700], np.float32),
        "encoder_hidden_states": rng.normal(size=(2, 77, 16)).astype(np.float32),
    }
    session = OnnxRuntime().load(unet, Profile(dims))
    wanted = handmade.answer(feeds)
    np.testing.assert_allclose(session(feeds)["out_sample"], wanted, atol=2e-6)
    view = session.bind({"encoder_hidden_states": feeds["encoder_hidden_states"]})
    rest = {k: feeds[k] for k in ("sample", "timestep")}
    np.testing.assert_allclose(view(rest)["out_sample"], wanted, atol=2e-6)
    assert capfd.readouterr() == ("", ""), "the library's warnings are silenced"


def test_threads(unet, monkeypatch):
    seen = []
    make = onnxruntime.InferenceSession

    def spy(path, options, providers):
        seen.append((options.intra_op_num_threads, providers))
        return make(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    monkeypatch.setattr(machine, "threads", lambda: 3)
    OnnxRuntime().load(unet, Profile())
    OnnxRuntime().load(unet, Profile(threads=1))
    assert seen == [(n, ["CPUExecutionProvider"]) for n in (3, 3, 1, 1)]


@pytest.mark.parametrize(
    ("profile", "fixed"),
    [
        (Profile(threads=2, pin=True), "4"),  # the caller's own thread is not the library's to pin
        (Profile(threads=1, pin=True), None),
        (Profile(threads=3, pin=True), None),  # more threads than places
        (Profile(threads=2), None),
    ],
)
def test_pinned_threads(profile, fixed, unet, monkeypatch):
    seen = []

    def spy(path, options, providers):
        try:
            seen.append(options.get_session_config_entry("session.intra_op_thread_affinities"))
        except RuntimeError:  # there is none
            seen.append(None)
        raise ValueError("enough")

    monkeypatch.setattr(machine, "places", lambda n: [1, 3][:n] if n <= 2 else [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with pytest.raises(BackendError, match="enough"):
        OnnxRuntime().load(unet, profile)
    assert seen == [fixed]


def test_two_wheels_that_overwrite_each_other(unet, monkeypatch):
    distribution = metadata.distribution

    def both(name):
        return distribution("onnxruntime") if name == "onnxruntime-gpu" else distribution(name)

    monkeypatch.setattr(metadata, "distribution", both)
    backend = OnnxRuntime()
    probe = backend.probe()
    assert not probe.ok
    assert "onnxruntime and onnxruntime-gpu are both installed" in probe.reason
    assert probe.mend == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime>=1.22'"
    )
    with pytest.raises(BackendUnavailable, match="onnxruntime and onnxruntime-gpu") as caught:
        backend.load(unet, Profile())
    assert caught.value.hint == probe.mend


def test_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    probe = OnnxRuntime().probe()
    assert (probe.ok, probe.reason) == (False, "the package onnxruntime is not installed")
    assert probe.mend == "pip install 'onnxruntime>=1.22'"


def test_float32_only(unet):
    with pytest.raises(BackendUnavailable, match="cannot compute unet in bf16") as caught:
        OnnxRuntime().load(unet, Profile(precision="bf16"))
    assert "it can in f32" in caught.value.hint


def test_a_graph_that_is_not_the_manifests(unet):
    full = dataclasses.replace(
        unet.graphs["full"], outputs=(TensorSpec("noise", "float32", ("B",)),)
    )
    with pytest.raises(CorruptPart, match="the outputs of unet/full are out_sample; the manifest"):
        OnnxRuntime().load(dataclasses.replace(unet, graphs={"full": full}), Profile())


def test_a_graph_that_is_none(unet):
    unet.graphs["full"].path.write_bytes(b"this is not ONNX")
    with pytest.raises(BackendError, match="onnxruntime cannot load unet for f32: ") as caught:
        OnnxRuntime().load(unet, Profile())
    assert "sdengine inspect --verify" in caught.value.hint


def test_weights_that_are_gone(unet):
    unet.weights.unlink()
    with pytest.raises(BackendError, match="onnxruntime cannot load unet"):
        OnnxRuntime().load(unet, Profile())
