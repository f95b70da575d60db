"""The VAE in tiles: golden samples of the reference, and the embedded model against its whole: in
bands on every backend, and blended as bundles have it that lack them."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine import bands, latents
from sdengine.engine.bundle import open_bundle
from sdengine.engine.spec import bands_of

LEAST = 40.0  # dB, of tiles against the whole; docs/numerics.md has what is reached
# Tiles of a bundle without bands, for the picture of 24 x 24 cells: side, dB of decoding.
BLENDED = [(16, 25.1)]


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
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture(scope="module")
def cuts(bundle):
    return {name: bands_of(component) for name, component in bundle.components.items()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("openvino", marks=pytest.mark.ov),
        pytest.param("onnxruntime", marks=pytest.mark.ort),
        pytest.param("torch", marks=pytest.mark.export),
    ],
)
def sessions(request, bundle):
    backend = backends.get(request.param)
    probe = backend.probe()
    if not probe.ok:
        pytest.skip(probe.reason)
    made = api.EngineSessions(bundle, backend, "f32", 1)
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


@pytest.mark.ov
def test_tiles_decode_to_what_the_whole_decodes_to_and_show_no_seam(sessions, drawn, cuts):
    """No seam: steps from pixel to pixel, of what tiling changed, are no larger where a tile
    begins or ends than elsewhere."""
    latent, _, facts = drawn
    whole = latents.decode(sessions, latent, facts.scale)
    tiled = latents.decode(sessions, latent, facts.scale, 16, cuts["vae_decoder"])
    assert psnr(tiled, whole) >= LEAST
    assert seam(tiled - whole, 16 * facts.factor) <= 1.5


@pytest.mark.ov
def test_tiles_encode_to_what_the_whole_encodes_to(sessions, drawn, cuts):
    """Judged by the pictures that both latents decode to, and by the latents themselves."""
    _, pixels, facts = drawn
    whole = latents.encode(sessions, pixels, facts.factor)
    tiled = latents.encode(sessions, pixels, facts.factor, 16, cuts["vae_encoder"])
    pictures = [
        latents.decode(sessions, latents.sample(m, None, facts.scale), facts.scale)
        for m in (tiled, whole)
    ]
    assert psnr(*pictures) >= LEAST
    mean, expected = tiled[:4].astype(float), whole[:4]
    assert 10 * np.log10(np.ptp(expected) ** 2 / np.mean((mean - expected) ** 2)) >= LEAST


@pytest.mark.ov
@pytest.mark.parametrize(("tile", "expected"), BLENDED)
def test_tiles_without_bands_are_as_near_as_was_measured(bundle, drawn, tile, expected):
    latent, _, facts = drawn
    made = api.EngineSessions(bundle, backends.get("openvino"), "f32", 1)
    whole = latents.decode(made, latent, facts.scale)
    assert psnr(latents.decode(made, latent, facts.scale, tile), whole) >= expected - 0.5
    made.close()


def seam(changed, side):
    """The largest mean step at an edge of a core, over the median step, in both directions."""
    largest = 0.0
    for axis in (1, 2):
        other = tuple(a for a in range(3) if a != axis)
        steps = np.abs(np.diff(changed, axis=axis)).mean(axis=other)
        cores = [t.core[axis - 1] for t in bands.tiles(*changed.shape[1:], side)]
        edges = sorted({core.stop - 1 for core in cores} - {changed.shape[axis] - 1})
        assert edges, "there are several tiles"
        largest = max(largest, steps[edges].max() / np.median(steps))
    return largest
