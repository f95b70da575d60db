"""The measures of quality against closed forms and against other libraries' numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from sdengine.bench import quality
from sdengine.engine.errors import RequestError


def scene(height=48, width=64):
    """A smooth picture with edges, uint8 [H, W, 3], the same on every machine."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 128 + 90 * np.sin(x / 5) * np.cos(y / 7)
    square = np.where((x > 20) & (x < 44) & (y > 12) & (y < 36), 40, 0)
    planes = [waves, waves * 0.6 + square, 255 - waves * 0.8 - square]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def damaged(picture, strength=20):
    """The same with a deterministic pattern of errors, worse at the right."""
    w = picture.shape[1]
    index = np.arange(picture.size).reshape(picture.shape)
    error = (index * 7919 % 101 / 50 - 1) * strength * (np.arange(w)[:, None] / w)
    return np.clip(picture + np.rint(error), 0, 255).astype(np.uint8)


def test_psnr_of_a_known_difference():
    """All of 255 values off by 5: 20 log10(255 / 5)."""
    a = np.full((16, 16, 3), 100, np.uint8)
    assert quality.psnr(a, a + np.uint8(5)) == pytest.approx(20 * math.log10(51), abs=1e-9)
    assert math.isinf(quality.psnr(a, a))


def test_ssim_of_flat_pictures_is_their_luminance_term():
    """No structure: (2 m n + c1) / (m^2 + n^2 + c1)."""
    m, n, c1 = 0.25, 0.75, 0.01**2
    a, b = np.full((32, 32), m), np.full((32, 32), n)
    assert quality.ssim(a, b) == pytest.approx((2 * m * n + c1) / (m * m + n * n + c1), abs=1e-12)


def test_ssim_of_a_picture_and_its_negative_is_below_zero(rng):
    noise = rng.uniform(0, 1, (40, 40))
    assert quality.ssim(noise, 1 - noise) < -0.9


# scikit-image 0.26.0: peak_signal_noise_ratio(a, b), structural_similarity(a / 255, b / 255,
# gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1) of luma and, with
# channel_axis=2, of RGB; piq 0.8.0: gmsd. On scene(size) and damaged(scene(size), strength):
OTHERS = [
    # size, strength, psnr, ssim of luma, ssim of RGB, gmsd
    (
        (48, 64),
        20,
        31.66620047021101,
        0.9529419821129094,
        0.8963124286711771,
        0.0019096757340158147,
    ),
    (
        (48, 64),
        120,
        16.395687743143014,
        0.4995675296903002,
        0.3499089043335006,
        0.05361838248623817,
    ),
    ((128, 128), 60, 22.10657394283169, 0.7333720756548529, 0.5721710945976267, 0.0119179418258921),
    ((49, 65), 60, 22.1537966563612, 0.7398974586878904, 0.59148082846164, 0.012958421051834203),
]


@pytest.mark.parametrize(("size", "strength", "psnr", "luma", "rgb", "gmsd"), OTHERS)
def test_the_measures_are_those_of_other_libraries(size, strength, psnr, luma, rgb, gmsd):
    a = scene(*size)
    found = quality.compare(damaged(a, strength), a)
    assert found.psnr_db == pytest.approx(psnr, abs=1e-9)
    assert found.ssim == pytest.approx(luma, abs=1e-9)
    assert found.ssim_rgb == pytest.approx(rgb, abs=1e-9)
    assert found.gmsd == pytest.approx(gmsd, abs=1e-9)


def test_the_parts_give_what_the_whole_gives():
    a, b = scene(), damaged(scene())
    found = quality.compare(a, b)
    assert (quality.psnr(a, b), quality.ssim(a, b)) == (found.psnr_db, found.ssim)
    assert (quality.ssim(a, b, luma=False), quality.gmsd(a, b)) == (found.ssim_rgb, found.gmsd)
    assert found.max_abs == pytest.approx(np.abs(a.astype(int) - b).max())


def test_bytes_and_floats_measure_alike():
    a, b = scene(), damaged(scene())
    assert quality.compare(a, b) == quality.compare(a / 255, b / 255)


def test_an_equal_picture_has_no_number_of_decibels():
    """JSON knows no infinity."""
    a = scene()
    perfect = {"psnr_db": None, "ssim": 1.0, "ssim_rgb": 1.0, "gmsd": 0.0, "max_abs": 0.0}
    assert quality.compare(a, a).to_dict() == pytest.approx(perfect)


@pytest.mark.parametrize(
    ("picture", "reference", "message", "hint"),
    [
        (scene(16, 16), scene(16, 32), r"\[16, 16, 3\].*\[16, 32, 3\]", "same size"),
        (scene(16, 16), scene(16, 16) / 255, "uint8.*float64", "same size and type"),
        (scene(16, 10), scene(16, 10), r"\[16, 10, 3\]", "each side 11 or more"),
        (np.zeros((3, 16, 16)), np.zeros((3, 16, 16)), r"\[3, 16, 16\]", r"give \[H, W, 3\]"),
        (np.full((16, 16), 1.5), np.zeros((16, 16)), "from 1.5", "x \\+ 1"),
        (np.full((16, 16), np.nan), np.zeros((16, 16)), "nan", "float in 0..1"),
        (np.zeros((16, 16), int), np.zeros((16, 16), int), "int64", "give uint8"),
    ],
)
def test_what_is_no_pair_of_pictures_is_refused(picture, reference, message, hint):
    with pytest.raises(RequestError, match=message) as caught:
        quality.compare(picture, reference)
    assert re.search(hint, caught.value.hint)
