"""Tiles: geometry, weights, and the exactness law of a network that sees no further than a cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine.engine import latents
from sdengine.engine.guidance import Conditions, Guidance
from sdengine.engine.table import Row
from sdengine.engine.tiles import WHOLE, Axis, Grid, Mosaic, Tiled

AXES = st.integers(1, 40).flatmap(
    lambda tile: st.builds(Axis.over, st.integers(1, 150), st.just(tile), st.integers(0, tile - 1))
)


@settings(max_examples=300, deadline=None)
@given(AXES, st.sampled_from([1, 4, 8]))
def test_tiles_cover_every_cell_once_in_sum(axis, scale):
    sums = np.zeros(axis.total * scale)
    for start, weight in zip(axis.starts, axis.weights(scale), strict=True):
        assert 0 <= start
        assert start + axis.side <= axis.total
        assert weight.shape == (axis.side * scale,)
        assert weight.min() > 0
        sums[start * scale : (start + axis.side) * scale] += weight
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40), st.integers(0, 39))
def test_tiles_share_what_was_asked_and_are_no_more_than_needed(total, tile, overlap):
    overlap = min(overlap, tile - 1)
    axis = Axis.over(total, tile, overlap)
    assert axis.side == min(tile, total)
    shared = axis.side - np.diff(axis.starts)
    assert all(shared >= overlap)
    assert all(shared < max(axis.side, 1)), "no tile stands where another one does"
    fewer = len(axis.starts) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < total


def test_a_blend_goes_smoothly_from_one_tile_to_the_next():
    """Two flat tiles that differ by 1: no step between neighbours above 1.5 / overlap."""
    grid = Grid.over(8, 24, 16, 8)
    mosaic = Mosaic(grid, (1, 64, 192), np.float32, 8)
    for k, (rows, columns) in enumerate(grid.windows(8)):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        mosaic.add(np.full((1, height, width), k, np.float32), (rows, columns))
    line = mosaic.result[0, 10]
    assert (line[0], line[-1]) == (0, 1)
    assert np.diff(line).min() >= 0
    assert np.diff(line).max() <= 1.5 / 64 + 1e-6


def test_a_picture_narrower_than_a_tile_has_its_own_size_there():
    grid = Grid.over(20, 6, 8, 2)
    assert {(r.stop - r.start, c.stop - c.start) for r, c in grid.windows()} == {(8, 6)}
    assert len(grid) == 3


def row(guidance=1.0):
    return Row(index=0, t=500.0, guidance=guidance, graph="full")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 24), st.integers(0, 23))
def test_tiled_equals_whole_for_a_pointwise_network(height, width, tile, overlap):
    beside = np.random.default_rng(3).random((2, 4, height, width)).astype(np.float32) - 0.5

    def part(x, row, window):
        return np.tanh(x) + beside[..., *window] * np.float32(row.t / 500)

    x = np.random.default_rng(4).standard_normal((2, 4, height, width)).astype(np.float32)
    tiled = Tiled(part, tile, min(overlap, tile * 3 // 4))(x, row())
    np.testing.assert_allclose(tiled, part(x, row(), WHOLE), rtol=0, atol=1e-6)


def test_one_tile_is_the_whole_bit_for_bit(rng):
    x = rng.standard_normal((1, 4, 16, 24)).astype(np.float32)

    def part(x, row, window):
        assert window == WHOLE
        return x * np.float32(1 / 3)

    assert np.array_equal(Tiled(part, 24)(x, row()), x * np.float32(1 / 3))


class Pointwise:
    """A UNet of 7 channels that answers latent + 10 * label + picture beside it; counts binds."""

    def __init__(self):
        self.opened, self.bound = [], 0

    def open(self, component, dims, *, paired=False):
        self.opened.append((component, dict(dims)))
        return self

    def bind(self, held):
        self.bound += 1
        self.held = held
        return self

    def graph(self, name):
        assert name == "full"
        return self

    def __call__(self, feeds):
        sample = feeds["sample"]
        label = self.held["class_labels"][:, None, None, None]
        text = self.held["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
        picture = np.pad(sample[:, 4:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        out = sample[:, :4] + 10 * label + picture + text
        return {"out_sample": out.astype(np.float32)}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_in_tiles_binds_once_and_gives_each_tile_its_own_channels(rng, guidance):
    x, low = (rng.standard_normal((2, c, 24, 40)).astype(np.float32) for c in (4, 3))
    text = [np.full((2, 77, 8), value, np.float32) for value in (0.5, 2.0)]
    conditions = Conditions(channels=low, labels=np.array([1, 2]))
    tiles, whole = Pointwise(), Pointwise()
    found = Tiled(Guidance(tiles.open, *text, conditions).part, 16)(x, row(guidance))
    expected = Guidance(whole.open, *text, conditions)(x, row(guidance))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert tiles.bound == 1
    assert tiles.opened == [("unet", {"B": 2 if guidance == 1 else 4, "T": 77, "h": 16, "w": 16})]


def vae(component, dims):
    """Every cell a square of 4 pixels, and back; remembers the shapes it was opened for."""
    shapes = vae.__dict__.setdefault("shapes", [])
    shapes.append(tuple(dims.values()))

    def decoder(feeds):
        latent = feeds["latent"]
        return {"image": latent[:, :3].repeat(4, axis=2).repeat(4, axis=3)}

    def encoder(feeds):
        image = feeds["image"][:, :, ::4, ::4]
        return {"moments": np.concatenate([image, 2 * image])}

    session = decoder if component == "vae_decoder" else encoder
    session.graph = lambda name: session  # type: ignore[attr-defined]
    return session


@pytest.mark.parametrize("tile", [None, 5, 8, 64])
def test_a_pointwise_vae_decodes_and_encodes_alike_in_tiles(rng, tile):
    latent = rng.standard_normal((4, 19, 8)).astype(np.float32)
    vae.__dict__["shapes"] = []
    pixels = latents.decode(vae, latent, 0.5, tile)
    np.testing.assert_allclose(pixels[:, ::4, ::4], 2 * latent[:3], rtol=0, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 3::4, 3::4], 2 * latent[:3], rtol=0, atol=1e-6)
    moments = latents.encode(vae, pixels, 4, tile)
    np.testing.assert_allclose(moments[:3], 2 * latent[:3], rtol=0, atol=1e-6)
    assert len(vae.__dict__["shapes"]) == 2, "one shape for the decoder and one for the encoder"
