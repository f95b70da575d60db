"""The feature cache on the model that ships: one setting is one picture on every backend, and it
is closer to the full run than plain fewer steps of the same cost are."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.bench.presets_search import Drawer
from sdengine.engine.bundle import open_bundle
from sdengine.engine.presets import Preset, cost, costs_of

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.ort]

PROMPT, SEED, SCALE = "a slice of pizza", 7, 5.0
CACHED = Preset("f32", 12, "dpmpp_2m", cache=3, cut=0)


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture(scope="module")
def draw(bundle):
    """`draw(backend, preset) -> uint8 picture`"""
    drawers = {}

    def picture(backend, preset):
        probe = backends.get(backend).probe()
        if not probe.ok and not os.environ.get("CI"):
            pytest.skip(probe.reason)
        if backend not in drawers:
            drawers[backend] = Drawer(bundle, backend, "f32", 1, SCALE)
        return drawers[backend].draw(preset, PROMPT, SEED)

    yield picture
    for drawer in drawers.values():
        drawer.close()


def psnr(a, b):
    """dB between two pictures of 8 bits."""
    square = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return np.inf if square == 0 else 10 * np.log10(255**2 / square)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_one_setting_is_one_picture(draw, backend):
    assert psnr(draw(backend, CACHED), draw("openvino", CACHED)) >= 50


def test_a_drawer_draws_what_the_pipeline_draws(draw):
    """The pipeline, which knows nothing of columns here, is the reference for plain rows."""
    plain = Preset("f32", 6, "dpmpp_2m")
    with api.load(backend="openvino", precision="f32", threads=1) as pipe:
        wanted = pipe(prompt=PROMPT, seed=SEED, steps=6, guidance=SCALE).image
    np.testing.assert_array_equal(draw("openvino", plain), np.asarray(wanted))


def test_the_cache_beats_plain_fewer_steps(bundle, draw):
    """20 steps with the cache cost less than 9 without: both against 20 full steps."""
    costs = costs_of(bundle.components["unet"])
    full, few = (Preset("f32", steps, "dpmpp_2m") for steps in (20, 9))
    cached = replace(CACHED, steps=20)
    drawer = Drawer(bundle, "openvino", "f32", 1, SCALE)
    assert cost(drawer.table(cached), costs) < cost(drawer.table(few), costs) == 9.0
    wanted = draw("openvino", full)
    with_cache, fewer = (psnr(draw("openvino", p), wanted) for p in (cached, few))
    assert with_cache >= 27  # 30.2 when it was written; 9 steps: 17.5
    assert with_cache >= fewer + 6
