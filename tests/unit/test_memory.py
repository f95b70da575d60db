"""The memory plan: what it needs against peaks measured with OpenVINO, and what it chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdengine.api import EMBEDDED
from sdengine.engine import memory
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError
from sdengine.engine.spec import is_band

MIB = 2**20


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(EMBEDDED["emoji"])


# Growth of the process in one call, float32, one thread (docs/numerics.md).
@pytest.mark.parametrize(
    ("need", "cells", "measured"),
    [
        (memory.vae_bytes, 32, 36),
        (memory.vae_bytes, 64, 137),
        (memory.vae_bytes, 96, 304),
        (memory.unet_bytes, 32, 13),
        (memory.unet_bytes, 64, 48),
        (memory.unet_bytes, 96, 105),
    ],
)
def test_the_estimate_covers_what_was_measured_and_not_much_more(bundle, need, cells, measured):
    estimate = (need(bundle, cells, cells) - need(bundle, 0, 0)) / MIB
    assert measured <= estimate <= 1.3 * measured


def test_scores_grow_with_the_square_of_the_tokens(bundle):
    plain, kept = (memory.vae_bytes(bundle, 64, 64, scores) for scores in (False, True))
    assert kept - plain == 4096**2 * 4


def test_nothing_is_tiled_where_it_fits_or_nobody_knows(bundle):
    roomy = memory.plan(bundle, 512, 512, 8 * 2**30)
    assert (roomy.vae_tile, roomy.unet_tile) == (None, None)
    assert "no tiles" in roomy.reason
    assert memory.plan(bundle, 4096, 4096, None).vae_tile is None
    assert memory.plan(bundle, 4096, 4096, 2**20, "off").vae_tile is None


def test_the_largest_tile_that_fits_is_taken_and_said(bundle):
    available = 400 * MIB
    chosen = memory.plan(bundle, 2048, 2048, available)
    assert chosen.vae_tile is not None
    assert chosen.vae_tile % bundle.facts.latent.multiple == 0
    assert chosen.unet_tile is None, "the UNet of this variant is never tiled by itself"
    fits, more = (
        memory.vae_bytes(bundle, side, side)
        for side in (chosen.vae_tile, chosen.vae_tile + bundle.facts.latent.multiple)
    )
    assert fits <= memory.SHARE * available < more
    assert f"tiles of {chosen.vae_tile} cells" in chosen.reason
    assert "400 MiB available" in chosen.reason


def test_bands_are_taken_where_they_fit_and_said(bundle):
    """Whole it would take 2.3 GiB; the maps between bands take 0.6."""
    chosen = memory.plan(bundle, 2048, 2048, 1500 * MIB)
    assert chosen.vae_tile is not None
    assert chosen.cuts["vae_decoder"][0] == "inner"
    assert chosen.cuts["vae_encoder"][-1] == "inner"
    assert memory.EXACT in chosen.reason
    fits, more = (
        memory.band_bytes(bundle, 256, 256, side)
        for side in (chosen.vae_tile, chosen.vae_tile + bundle.facts.latent.multiple)
    )
    assert fits <= memory.SHARE * 1500 * MIB < more


def test_where_bands_do_not_fit_tiles_are_blended_and_said(bundle):
    chosen = memory.plan(bundle, 2048, 2048, 400 * MIB)
    assert chosen.vae_tile is not None
    assert not chosen.cuts
    assert memory.BLENDED in chosen.reason


def test_a_bundle_without_bands_blends_the_tiles_asked_for(bundle):
    parts = {
        name: replace(c, graphs={n: g for n, g in c.graphs.items() if not is_band(n)})
        for name, c in bundle.components.items()
    }
    old = memory.plan(replace(bundle, components=parts), 1024, 512, 2**40, 32)
    assert not old.cuts
    assert memory.BLENDED in old.reason
    new = memory.plan(bundle, 1024, 512, 2**40, 32)
    assert set(new.cuts) == {"vae_decoder", "vae_encoder"}
    assert memory.EXACT in new.reason
    assert memory.EXACT not in memory.plan(bundle, 256, 256, 2**40, 64).reason, "one tile is none"


def test_an_upscaler_tiles_its_unet_too(bundle):
    x4 = replace(bundle, facts=replace(bundle.facts, variant="x4-upscaler"))
    chosen = memory.plan(x4, 2048, 2048, 400 * MIB)
    assert chosen.unet_tile is not None
    assert f"the UNet in tiles of {chosen.unet_tile} cells" in chosen.reason
    asked = memory.plan(x4, 2048, 2048, 400 * MIB, "64")
    assert (asked.vae_tile, asked.unet_tile) == (64, 64)


def test_a_tile_asked_for(bundle):
    assert memory.plan(bundle, 1024, 512, 2**40, 32).vae_tile == 32
    assert memory.plan(bundle, 256, 256, 2**40, 64).vae_tile is None, "it holds the whole"
    large = memory.plan(bundle, 1024, 1024, 2**40, unet=64)
    assert (large.vae_tile, large.unet_tile) == (None, 64)


@pytest.mark.parametrize("asked", [0, 8, 17, -32, True, "many", "", "3.5", "²"])
def test_a_tile_that_makes_no_sense(bundle, asked):
    with pytest.raises(RequestError, match="multiple of 8") as caught:
        memory.plan(bundle, 512, 512, 2**40, asked)
    assert "auto, off, or a number" in caught.value.hint


def test_too_little_memory_for_any_tile(bundle):
    with pytest.raises(RequestError, match=r"needs about .* this machine has 20 MiB") as caught:
        memory.plan(bundle, 512, 512, 20 * MIB)
    assert "--tile 16" in caught.value.hint


def test_weights_count_by_parameters_whatever_they_are_stored_as(bundle):
    """The embedded weights are float16: two bytes each, but for the header of the file."""
    stored = bundle.component("unet").weights.stat().st_size
    held = memory.unet_bytes(bundle, 0, 0)
    assert 0.95 * 4 * stored <= held <= 4 * stored
