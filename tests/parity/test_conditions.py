"""What the UNet of a recorded run is conditioned on, against the constants of the reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sdengine.engine.bundle import (
    STATISTICS,
    ImageConditioningFacts,
    LowScaleFacts,
    NoiseFacts,
    ScheduleFacts,
)
from sdengine.export import conditions

pytestmark = pytest.mark.export

SIDES = (8, 12)
LATENT = SimpleNamespace(channels=4, factor=8, scale=0.5)
FACTS = SimpleNamespace(
    latent=LATENT,
    low_scale=LowScaleFacts(ScheduleFacts("scaled_linear", 0.0001, 0.02, 1000), 350),
    image_conditioning=ImageConditioningFacts(
        56, (0.5, 0.5, 0.5), (0.25, 0.25, 0.5), 6, NoiseFacts("squaredcos_cap_v2", 1000), True
    ),
)


def test_the_picture_is_one():
    x = conditions.picture(64, 96)
    assert (x.shape, x.dtype) == ((1, 3, 64, 96), np.float32)
    assert x.min() >= -1
    assert x.max() <= 1
    assert x.std() > 0.3
    assert np.array_equal(x, conditions.picture(64, 96))


def test_inpainting_is_the_mask_and_the_latent_of_what_is_kept():
    seen = []

    def encode(image):
        seen.append(image)
        return np.arange(8 * 8 * 12, dtype=np.float32).reshape(1, 8, *SIDES)

    made = conditions.inpainting(FACTS, SIDES, encode)
    found = made.channels(SIDES)
    assert (found.shape, found.dtype) == ((1, 5, *SIDES), np.float32)
    assert set(np.unique(found[:, 0])) == {0, 1}
    assert np.array_equal(found[0, 1:], 0.5 * encode(None)[0, :4])  # the mean, scaled
    (image,) = seen[:1]
    hole = np.kron(found[0, 0], np.ones((8, 8)))
    assert not image[0][:, hole == 1].any()
    assert np.array_equal(image[0][:, hole == 0], conditions.picture(64, 96)[0][:, hole == 0])
    assert made.channels((16, 16)).shape == (1, 5, 16, 16)
    assert not made.labels


def test_depth_is_stretched_to_the_whole_range():
    found = np.random.default_rng(0).random((1, 32, 32), np.float32) * 7 + 3
    for made in (conditions.depth(found), conditions.depth(None)):
        x = made.channels(SIDES)
        assert (x.shape, x.dtype) == ((1, 1, *SIDES), np.float32)
        assert (x.min(), x.max()) == (-1, 1)
    ground = conditions.depth(None).channels(SIDES)[0, 0]
    assert (np.diff(ground, axis=0) > 0).all()  # nearer downwards, and larger is nearer


def test_a_flat_depth_map_is_no_nan():
    x = conditions.depth(np.full((1, 32, 32), 3, np.float32)).channels(SIDES)
    assert np.isfinite(x).all()


def test_low_scale_is_noised_as_level_20_has_it():
    """reference-spec 1.11: 0.998650 x + 0.051949 noise"""
    made = conditions.low_scale(FACTS)
    noise = (made.channels((64, 64)) - 0.998650 * conditions.picture(64, 64)) / 0.051949
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert made.labels["class_labels"].tolist() == [20, 20]
    assert made.labels["class_labels"].dtype == np.int64


def test_pixels_are_normalised():
    x = conditions.pixels(FACTS)
    assert (x.shape, x.dtype) == ((2, 3, 56, 56), np.float32)
    whole = (conditions.picture(56, 56)[0] + 1) / 2
    np.testing.assert_allclose(x[0, 2], (whole[2] - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(x[1, 0, :, ::-1], (whole[0] - 0.5) / 0.25, atol=1e-6)


def test_class_vector():
    """reference-spec 1.9: sqrt(1 - acp[0]) is 0.006425; cosines come first in the sinusoid."""
    statistics = {
        STATISTICS[0]: np.arange(6, dtype=np.float32),
        STATISTICS[1]: np.linspace(0.5, 2, 6, dtype=np.float32),
    }
    random = np.random.default_rng(1)
    one, two = random.standard_normal((2, 1, 6)).astype(np.float32)
    made = [conditions.unclip(FACTS, e, statistics).labels["class_labels"] for e in (one, two)]
    for both in made:
        assert (both.shape, both.dtype) == ((2, 12), np.float32)
        assert not both[0].any()
        assert both[1, 6:].tolist() == [1, 1, 1, 0, 0, 0]
    kept = (1 - 0.006425**2) ** 0.5
    np.testing.assert_allclose(made[0][1, :6] - made[1][1, :6], kept * (one - two)[0], atol=1e-5)
    # Around the mean of the data, not around zero: its own noise is all that moves it.
    mean = statistics[STATISTICS[0]][None]
    moved = conditions.unclip(FACTS, mean, statistics).labels["class_labels"][1, :6] - mean[0]
    plain = replace(FACTS.image_conditioning, statistics=False)
    without = SimpleNamespace(**{**vars(FACTS), "image_conditioning": plain})
    noise = conditions.unclip(without, np.zeros((1, 6)), {}).labels["class_labels"][1, :6]
    np.testing.assert_allclose(moved, noise * statistics[STATISTICS[1]], atol=1e-6)
    assert 0 < np.abs(noise).max() < 4 * 0.006425
