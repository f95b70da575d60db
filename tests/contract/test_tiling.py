"""The VAE in tiles: golden samples of the reference, and the embedded model against its whole."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine import latents
from sdengine.engine.bundle import open_bundle


@pytest.mark.parametrize("case", ["vae_f8", "vae_f4"])
def test_a_sample_is_the_references(golden, case):
    facts, arrays = golden(case)
    scale = facts["config"]["scale_factor"]
    moments, noise = arrays["out.moments"], arrays["in.posterior_noise"]
    for one, unit, expected in zip(moments, noise, arrays["out.latent"], strict=True):
        found = latents.sample(one, unit, scale)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    for one, mean in zip(moments, arrays["out.mean"], strict=True):
        np.testing.assert_allclose(latents.sample(one, None, scale), scale * mean, atol=1e-6)


def test_extreme_variances_are_clipped_as_in_the_reference(golden):
    _, arrays = golden("vae_f8")
    (moments,) = arrays["in.clamp_moments"]
    mean = moments[:4]
    unit = np.ones_like(mean)
    deviation = latents.sample(moments, unit, 1.0) - latents.sample(moments, None, 1.0)
    np.testing.assert_allclose(deviation, arrays["out.clamp_std"][0], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def sessions():
    probe = backends.get("openvino").probe()
    if not probe.ok:
        pytest.skip(probe.reason)
    bundle = open_bundle(api.EMBEDDED["emoji"])
    made = api.EngineSessions(bundle, backends.get("openvino"), "f32", 1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def drawn():
    """A picture that the model makes, at 192 pixels: its latent, and its pixels in -1..1."""
    with api.load(backend="openvino", precision="f32", threads=1) as pipe:
        made = pipe(prompt="a red apple", seed=1, steps=8, guidance=5.0, width=192, height=192)
    (picture,) = made.pictures
    pixels = np.asarray(picture.image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return picture.latent, np.ascontiguousarray(pixels), pipe.facts.latent


def psnr(found, expected):
    """dB of two pictures in -1..1."""
    found, expected = (np.clip(x, -1, 1) for x in (found, expected))
    return 10 * np.log10(4 / np.mean((found.astype(float) - expected) ** 2))
