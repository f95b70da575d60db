"""ONNX Runtime on a GPU of host memory: options, addresses, captures, and every way to fail."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.backends import onnxruntime_cuda
from sdengine.backends.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendUnavailable, MissingPart
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.spec import Profile

from ..fake_cuda import FakeDevice

pytestmark = pytest.mark.ort

UNET = {"B": 2, "T": 77, "h": 16, "w": 16}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture
def device(folder):
    return FakeDevice(folder)


@pytest.fixture(autouse=True)
def _one_wheel(monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "_installed", lambda name: name == "onnxruntime-gpu")


def made(device, kind=OnnxRuntimeCuda, **options):
    from .. import fake_onnxruntime

    library = fake_onnxruntime.library(device, **options)
    return kind(lambda index: device, library), library


@pytest.mark.parametrize("kind", [OnnxRuntimeCuda, OnnxRuntimeTensorRT])
def test_a_picture_on_the_device(kind, device, bundle):
    backend, library = made(device, kind, refuses={"prologue.onnx"})
    request = {"prompt": "a red fox", "seed": 3, "steps": 4, "cache": 2}
    steps = []
    with Pipeline(bundle, api.EngineSessions(bundle, backend, "f32", 1), {}) as pipe:
        result = pipe(**request, on_step=lambda p: steps.append(list(device.calls)))
    plain = api.EngineSessions(bundle, backends.get("onnxruntime"), "f32", 1)
    with Pipeline(bundle, plain, {}) as pipe:
        wanted = np.asarray(pipe(**request).image, float)
    assert np.abs(np.asarray(result.image, float) - wanted).max() <= 2
    between = steps[-1][len(steps[0]) :]
    assert ("wait",) not in between, "the host ran ahead"
    assert ("engine", "shallow0.onnx") in between
    del result
    gc.collect()
    assert device.memory == {}
    by_name = {s.name: s for s in library.made}
    runs = by_name["shallow0.onnx"].runs
    assert {r["gpu_graph_id"] for r in runs} == {"-1"}, "its features come from elsewhere each time"
    assert {r["disable_synchronize_execution_providers"] for r in runs} == {"1"}
    (captured,) = {r["gpu_graph_id"] for r in by_name["deep.onnx"].runs}
    assert int(captured) > 0
    assert {r["gpu_graph_id"] for r in by_name["prologue.onnx"].runs} == {"-1"}, "it was refused"


def test_the_options_of_the_providers(device, bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path))
    for kind in (OnnxRuntimeCuda, OnnxRuntimeTensorRT):
        backend, library = made(device, kind)
        session = backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
        (opened,) = library.made
        assert next(iter(opened.providers)) == kind.provider
        options = opened.providers[kind.provider]
        assert options["device_id"] == "0"
        assert int(options["user_compute_stream"]) in device.streams
        cuda = opened.providers["CUDAExecutionProvider"]
        captured = kind is OnnxRuntimeCuda
        assert cuda["enable_cuda_graph"] == str(int(captured))
        assert cuda["use_tf32"] == "0"
        if not captured:
            assert options["trt_cuda_graph_enable"] == options["trt_engine_cache_enable"] == "1"
            assert options["trt_engine_cache_path"] == str(tmp_path / "onnxruntime-trt")
        session.close()


def test_open_sizes_are_not_captured(device, bundle):
    backend, library = made(device)
    session = backend.load(bundle.components["text_encoder"], Profile())
    assert library.made[0].providers[backend.provider]["enable_cuda_graph"] == "0"
    for batch in (1, 3):
        ids = np.arange(77 * batch, dtype=np.int64).reshape(batch, 77)
        assert session({"input_ids": ids})["last_hidden_state"].shape == (batch, 77, 96)
    session.close()


def test_two_bound_sessions_have_graphs_of_their_own(device, bundle):
    backend, library = made(device)
    session = backend.load(bundle.components["unet"], Profile(UNET))
    random = np.random.default_rng(0)
    texts = [random.standard_normal((2, 77, 96)).astype(np.float32) for _ in range(2)]
    feeds = {
        "sample": random.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.full(2, 300.0, np.float32),
    }
    bound = [session.bind({"encoder_hidden_states": t}).graph("full") for t in texts]
    results = [b(feeds)["out_sample"] for b in bound]
    plain = backends.get("onnxruntime").load(bundle.components["unet"], Profile(UNET))
    for text, found in zip(texts, results, strict=True):
        wanted = plain({**feeds, "encoder_hidden_states": text})["out_sample"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    plain.close()
    full = next(s for s in library.made if s.name == "full.onnx")
    ids = [int(r["gpu_graph_id"]) for r in full.runs]
    assert len(set(ids)) == len(ids) == 2
    assert min(ids) > 0
    session.close()


def test_both_wheels_at_once(monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "_installed", lambda name: True)
    probe = OnnxRuntimeCuda().probe()
    assert not probe.ok
    assert "both installed and overwrite each other's files" in probe.reason
    assert "without a word" in probe.reason
    assert probe.mend.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_a_build_without_the_provider(device, bundle):
    backend, _ = made(device, available=("AzureExecutionProvider", "CPUExecutionProvider"))
    assert backend.probe().reason == "this build of onnxruntime has Azure, CPU; not CUDA"
    with pytest.raises(BackendUnavailable, match="not CUDA") as caught:
        backend.load(bundle.components["text_encoder"], Profile())
    assert "onnxruntime-gpu" in caught.value.hint
    backend, _ = made(device, OnnxRuntimeTensorRT, available=("CUDAExecutionProvider",))
    assert "not Tensorrt" in backend.probe().reason


def test_falling_back_to_the_processor_is_an_error(device, bundle):
    backend, _ = made(device, falls_back=True)
    with pytest.raises(BackendUnavailable, match=r"left CUDA out: .*CPUExecution") as caught:
        backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
    assert "cuDNN" in caught.value.hint


def test_no_driver():
    def no_driver(index):
        raise BackendUnavailable("there is no NVIDIA driver", hint="install it")

    from types import SimpleNamespace

    library = SimpleNamespace(
        __version__="1", get_available_providers=lambda: ["CUDAExecutionProvider"]
    )
    probe = OnnxRuntimeCuda(no_driver, library).probe()
    assert not probe.ok
    assert (probe.reason, probe.mend) == ("there is no NVIDIA driver", "install it")


def test_half_precision_takes_typed_graphs(device, bundle):
    backend, _ = made(device)
    with pytest.raises(MissingPart, match="no strongly typed graphs in f16"):
        backend.load(bundle.components["unet"], Profile(UNET, "f16"))


@pytest.mark.parametrize("name", ["cuda:x", "tpu"])
def test_a_device_that_is_none(name, device):
    backend, _ = made(device)
    probe = backend.probe_on(name)
    assert not probe.ok
    assert "is no GPU that CUDA knows" in probe.reason
    assert "CUDA_VISIBLE_DEVICES" in probe.mend
    assert backend.probe_on("cuda:0").ok
