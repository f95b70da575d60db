"""Bands: their tiles, the maps between them, statistics, and a run on known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine import api, backends
from sdengine.engine import bands, latents
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import NumericsError
from sdengine.engine.spec import bands_of

EVEN = st.integers(1, 60).map(lambda n: 2 * n)
SIDES = st.integers(4, 40).map(lambda n: 2 * n)
WHOLE = (slice(None), slice(None))


@settings(max_examples=200, deadline=None)
@given(EVEN, EVEN, SIDES)
def test_cores_cover_each_cell_once_and_stay_clear_of_inner_edges(height, width, side):
    seen = np.zeros((height, width), int)
    sizes = set()
    for tile in bands.tiles(height, width, side):
        seen[tile.core] += 1
        sizes.add(tuple(s.stop - s.start for s in tile.window))
        for window, core, total in zip(tile.window, tile.core, (height, width), strict=True):
            assert window.start % 2 == core.start % 2 == core.stop % 2 == 0
            assert core.start == 0 if window.start == 0 else core.start >= window.start + bands.RIM
            assert (
                core.stop == total if window.stop == total else core.stop <= window.stop - bands.RIM
            )
    assert (seen == 1).all()
    assert sizes == {(min(side, height), min(side, width))}, "one compiled shape serves all tiles"


def test_statistics_of_parts_are_those_of_the_whole(rng):
    """Against numpy's own in float64, of values far from zero, where squares would cancel."""
    values = (1000 + rng.standard_normal((8, 20, 30))).astype(np.float32)
    gathered = bands.Statistics()
    for tile in bands.tiles(20, 30, 12):
        gathered.add(np.ascontiguousarray(values[:, *tile.core]))
    high, low, variance = gathered.grouped(4)[0].T.astype(np.float64)
    flat = values.astype(np.float64).reshape(4, -1)
    np.testing.assert_allclose(high + low, flat.mean(1), rtol=1e-7)
    np.testing.assert_allclose(variance, flat.var(1), rtol=1e-4)


def test_the_first_part_of_a_mean_is_exact_in_bfloat16():
    """Its lower 16 bits, which bfloat16 lacks, are zero; the rest is below 2**-8 of it."""
    gathered = bands.Statistics(1, np.array([1.0, -3.14159, 1234.567, 1e-5]), np.zeros(4))
    high, low, _ = gathered.grouped(4)[0].T
    assert (np.ascontiguousarray(high).view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(low) <= 2.0**-8 * np.abs(high)).all()


def test_wide_maps_are_kept_in_half_precision_and_narrow_ones_are_not(rng):
    for channels, error in ((16, 0.0), (17, 2.0**-11)):
        values = rng.standard_normal((channels, 6, 6)).astype(np.float32)
        found = bands.Map.of(values).whole()
        assert found.dtype == np.float32
        assert np.abs(found - values).max() <= error * np.abs(values).max()


def test_values_beyond_half_precision_and_beyond_the_first_tile_are_kept(rng):
    """float16 ends at 65504 and this map holds a million; its first window held thousandths."""
    values = rng.standard_normal((32, 4, 8)).astype(np.float32)
    values[..., :4] *= 1e-3
    values[..., 4:] *= 1e6
    made = bands.Map(values.shape)
    for columns in (slice(0, 4), slice(4, 8)):
        made.put((slice(None), columns), values[..., columns])
    found = made.whole()
    assert np.abs(found[..., 4:] - values[..., 4:]).max() <= 2.0**-11 * np.abs(values).max()
    assert np.abs(found[..., :4]).max() < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_refused(bad):
    values = np.zeros((32, 2, 2), np.float32)
    values[3, 1, 1] = bad
    with pytest.raises(NumericsError, match="NaN or infinity") as caught:
        bands.Map.of(values)
    assert "--precision f32" in caught.value.hint


@pytest.fixture(scope="module")
def embedded():
    """The embedded bundle on networks with known answers."""
    bundle = open_bundle(api.EMBEDDED["emoji"])
    fake = backends.get("fake")
    sessions = api.EngineSessions(bundle, fake, "f32", 1)
    yield {n: bands_of(c) for n, c in bundle.components.items()}, sessions, fake.calls
    sessions.close()


def test_a_latent_goes_through_all_bands_and_comes_out_as_the_picture(embedded, rng):
    cuts, sessions, calls = embedded
    latent = rng.standard_normal((4, 24, 40)).astype(np.float32)
    whole = latents.decode(sessions, latent, 0.5)
    found = latents.decode(sessions, latent, 0.5, 16, cuts["vae_decoder"])
    np.testing.assert_allclose(found, whole, atol=2e-3)
    assert calls["vae_decoder/inner"] == 1
    # 24 x 40 cells in tiles of 16 that share two cells of a map twice as fine: 2 x 3.
    assert calls["vae_decoder/outer0"] == calls["vae_decoder/outer21"] == 2 * 3


def test_a_picture_goes_through_all_bands_and_comes_out_as_its_latent(embedded, rng):
    cuts, sessions, calls = embedded
    pixels = rng.uniform(-0.9, 0.9, (3, 192, 320)).astype(np.float32)
    whole = latents.encode(sessions, pixels, 8)
    found = latents.encode(sessions, pixels, 8, 16, cuts["vae_encoder"])
    np.testing.assert_allclose(found, whole, atol=2e-3)
    assert calls["vae_encoder/inner"] == 1
    assert calls["vae_encoder/outer12"] == 2 * 3


def test_a_tile_that_holds_the_whole_runs_it_whole(embedded, rng):
    cuts, sessions, calls = embedded
    before = calls["vae_decoder"]
    latents.decode(sessions, rng.standard_normal((4, 16, 16), np.float32), 1.0, 16, cuts)
    assert calls["vae_decoder"] == before + 1
