"""The VAE in tiles: golden samples of the reference, and the embedded model against its whole."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine import latents
from sdengine.engine.bundle import open_bundle

# The rows of docs/numerics.md for the picture of 24 x 24 cells: tile, dB of decoding, dB of it
# without its colour cast; tile, dB of encoding.
DECODED = [(12, 21.0, 32.5), (16, 25.1, 34.6), (20, 29.0, 36.2)]
ENCODED = [(12, 33.2), (16, 36.0), (20, 35.7)]


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


def without_cast(found, expected):
    """`found` after the one colour map (3 x 4, least squares) that brings it nearest."""
    flat = np.concatenate([found.reshape(3, -1), np.ones((1, found[0].size), found.dtype)]).T
    matrix = np.linalg.lstsq(flat, expected.reshape(3, -1).T, rcond=None)[0]
    return (flat @ matrix).T.reshape(found.shape)


@pytest.mark.ov
@pytest.mark.parametrize(("tile", "plain", "fitted"), DECODED)
def test_decoding_in_tiles_is_as_near_as_was_measured(sessions, drawn, tile, plain, fitted):
    latent, _, facts = drawn
    whole = latents.decode(sessions, latent, facts.scale)
    tiled = latents.decode(sessions, latent, facts.scale, tile)
    assert psnr(tiled, whole) >= plain - 0.5
    assert psnr(without_cast(tiled, whole), whole) >= fitted - 0.5


@pytest.mark.ov
@pytest.mark.parametrize(("tile", "expected"), ENCODED)
def test_encoding_in_tiles_is_as_near_as_was_measured(sessions, drawn, tile, expected):
    """Judged by the pictures that the two latents decode to."""
    _, pixels, facts = drawn
    pictures = [
        latents.decode(
            sessions,
            latents.sample(latents.encode(sessions, pixels, facts.factor, t), None, facts.scale),
            facts.scale,
        )
        for t in (tile, None)
    ]
    assert psnr(*pictures) >= expected - 0.5


@pytest.mark.ov
def test_no_step_where_a_tile_begins_or_ends(sessions, drawn):
    """The steps from one pixel to the next, of what tiling changed, are no larger at the edges of
    tiles than elsewhere."""
    latent, _, facts = drawn
    whole = latents.decode(sessions, latent, facts.scale)
    changed = latents.decode(sessions, latent, facts.scale, 16) - whole
    steps = np.abs(np.diff(changed, axis=2)).mean(axis=(0, 1))
    edges = [8 * 8 - 1, 16 * 8 - 1]  # the second tile begins at cell 8, the first ends at 16
    assert steps[edges].max() <= 1.5 * np.median(steps)
