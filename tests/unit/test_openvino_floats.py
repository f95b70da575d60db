"""What stays in float32 in a bfloat16 network: on the embedded model's shallow graph."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api
from sdengine.backends import openvino_floats
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO, library
from sdengine.engine.bundle import open_bundle
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.ov
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def unet():
    return open_bundle(api.find_model("emoji")).components["unet"]


def feeds_of(graph, rng):
    dims = {"B": 1, "T": 77, "h": 16, "w": 16}
    return {t.name: rng.standard_normal(t.resolve(dims)).astype(np.float32) for t in graph.inputs}


def opened(unet, precision):
    backend = OpenVINO(Store(limit=0))
    if "bf16" not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16")
    profile = Profile({"B": 1, "T": 77, "h": 16, "w": 16}, precision, 1)
    return backend.compile(unet, unet.graphs["shallow0"], profile).open({})


def test_the_time_is_not_rounded_and_the_rest_is_closer(unet, monkeypatch):
    """In bfloat16 999 is 1000, and the angle of the fastest wave is off by radians."""
    feeds = feeds_of(unet.graphs["shallow0"], np.random.default_rng(5))
    exact, kept = opened(unet, "f32"), opened(unet, "bf16")
    monkeypatch.setattr(openvino_floats, "keep_float32", lambda *_, **__: 0)
    plain = opened(unet, "bf16")

    def at(run, time):
        return run({**feeds, "timestep": np.full(1, time, np.float32)})["out_sample"]

    assert np.array_equal(at(plain, 999), at(plain, 1000)), "what OpenVINO does by itself"
    step = at(exact, 999) - at(exact, 1000)
    seen = at(kept, 999) - at(kept, 1000)
    assert np.corrcoef(step.ravel(), seen.ravel())[0, 1] > 0.5
    lost = [np.mean((at(run, 741) - at(exact, 741)) ** 2) for run in (plain, kept)]
    assert lost[1] < lost[0] / 1.5


def test_only_a_step_is_marked(unet):
    core = library().Core()
    step = core.read_model(unet.graphs["shallow0"].path)
    assert openvino_floats.keep_float32(core, step) > 20
    prologue = core.read_model(unet.graphs["prologue"].path)
    assert openvino_floats.keep_float32(core, prologue) == 0
    products = [n for n in step.get_ordered_ops() if n.get_type_name() in ("Convolution", "MatMul")]
    marked = [
        n.friendly_name
        for n in products
        if "DisablePrecisionConversion_0" in n.get_rt_info().keys()
    ]
    assert [n for n in marked if "emb" not in n] == ["out.2/Conv/WithoutBiases"]


def test_convolutions_of_a_network_without_int8(unet):
    """The one that reads the picture, those on skips and the last; not one more."""
    core, graph = library().Core(), unet.graphs["full"]

    def marked(**how):
        model = core.read_model(graph.path)
        openvino_floats.keep_float32(core, model, **how)
        nodes = [n for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]
        mark = "DisablePrecisionConversion"
        return [n.get_friendly_name() for n in nodes if any(mark in k for k in n.get_rt_info())]

    (last,) = marked()
    names = marked(convolutions=True)
    first, still_last = [n for n in names if "skip_connection" not in n]
    assert still_last == last
    assert first.startswith("input_blocks.0.0")
    skips = [n for n in names if "skip_connection" in n]
    assert {n.split(".")[1] for n in skips if n.startswith("output")} == {str(k) for k in range(12)}
