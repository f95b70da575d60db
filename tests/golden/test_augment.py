"""Noise augmentation against the reference's own pictures, embeddings and class vectors."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine.augment import Augmentor, level_embedding, mix
from sdengine.engine.errors import RequestError

# The reference's exponential is off by its last bit, which the level multiplies.
BIT = 2.0**-23


def upscaler(top: int = 350) -> Augmentor:
    return Augmentor.scaled_linear(0.0001, 0.02, 1000, top)


def unclip(arrays, kind: str) -> Augmentor:
    statistics = (arrays.get(f"in.{kind}.data_{name}") for name in ("mean", "std"))
    return Augmentor.squaredcos_cap_v2(1000, *statistics)


@pytest.mark.parametrize(
    ("name", "made"),
    [("x4", upscaler()), ("squaredcos_cap_v2", Augmentor.squaredcos_cap_v2(1000))],
)
def test_levels_are_the_stored_buffers(golden, name, made):
    stored = golden("schedules")[0]["beta_schedules"][name]
    names = {"keep": "sqrt_alphas_cumprod", "blur": "sqrt_one_minus_alphas_cumprod"}
    for field, name in names.items():
        ours, theirs = getattr(made, field), np.array(stored[f"{name}_float32"], np.float32)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.float32


def test_low_resolution_picture(golden):
    _, a = golden("noise_augmentation")
    assert a["in.low_res_level"].tolist() == [0, 20, 100, 350]
    for i, level in enumerate(a["in.low_res_level"]):
        got = upscaler().noised(a["in.low_res"][i], level, a["in.low_res_noise"][i])
        np.testing.assert_array_equal(got, a["out.low_res"][i])


@pytest.mark.parametrize("kind", ["h", "l"])
def test_embedding(golden, kind):
    _, a = golden("noise_augmentation")
    assert a[f"in.{kind}.level"].tolist() == [0, 50, 500, 999]
    for i, level in enumerate(a[f"in.{kind}.level"]):
        given = (a[f"in.{kind}.embedding"][i], level, a[f"in.{kind}.noise"][i])
        got = unclip(a, kind).class_vector(*given)
        width = len(given[0])
        assert (got.shape, got.dtype) == ((2 * width,), np.float32)
        want = a[f"out.{kind}.y"][i]
        np.testing.assert_allclose(got[:width], want[:width], rtol=0, atol=5e-7)
        np.testing.assert_allclose(got[width:], want[width:], rtol=0, atol=BIT * (level + 2))


@pytest.mark.parametrize("width", [256, 320, 1024])
def test_sinusoid(golden, width):
    _, a = golden("noise_augmentation")
    for time, want in zip(a["in.sinusoid_t"], a[f"out.sinusoid_{width}"], strict=True):
        got = level_embedding(time, width)
        np.testing.assert_allclose(got, want, rtol=0, atol=BIT * (time + 2))
        assert got.dtype == np.float32


def test_sampler_cases(golden):
    _, a = golden("sampler_x4")
    for i, level in enumerate(a["in.noise_level"]):
        got = upscaler().noised(a["in.low_res"][i], level, a["in.low_res_noise"][i])
        np.testing.assert_array_equal(got, a["out.low_res_noised"][i])
    _, a = golden("sampler_unclip")
    made = Augmentor.squaredcos_cap_v2(1000)
    for i, level in enumerate(a["in.noise_level"]):
        got = made.class_vector(a["in.embedding"][i], level, a["in.embedding_noise"][i])
        np.testing.assert_allclose(got, a["out.y"][i], rtol=0, atol=2e-7)


def test_pipeline_upscale(golden):
    """An 8-bit picture in, level 20."""
    _, a = golden("pipeline_upscale_x4")
    x = (a["in.image_u8"].astype(np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
    got = upscaler().noised(x, 20, a["in.low_res_noise"][0])
    np.testing.assert_allclose(got, a["out.low_res_noised"][0], rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["h", "l"])
def test_pipeline_unclip(golden, kind):
    """Statistics of zeros and ones are as good as none."""
    _, a = golden(f"pipeline_unclip_{kind}")
    embedding = a["out.embedding"][0]
    neutral = [np.zeros_like(embedding), np.ones_like(embedding)]
    made = Augmentor.squaredcos_cap_v2(1000, *(neutral if kind == "l" else ()))
    got = made.class_vector(embedding, 0, a["in.embedding_noise"][0])
    np.testing.assert_allclose(got, a["out.y"][0], rtol=0, atol=2e-7)


def test_one_picture_mixed_is_itself(golden):
    _, a = golden("noise_augmentation")
    for weight in (1.0, 0.3, -2.0):
        np.testing.assert_array_equal(mix(a["out.h.y"][:1], [weight]), a["out.h.y"][0])


def test_mix_by_hand():
    vectors = np.array([[1, 0, 2, 8], [3, 4, 2, 0]], np.float32)
    np.testing.assert_array_equal(mix(vectors, [0.5, 1.5]), [2.5, 3, 2, 2])
    np.testing.assert_array_equal(mix(vectors, [2, -1]), [-1, -4, 2, 16])  # away from the second
    assert mix(vectors, [1, 1]).dtype == np.float32


def test_a_mix_noised_again(golden):
    """Level half replaced, embedding half noised: the reference's own level 50 from a fresh one."""
    _, a = golden("noise_augmentation")
    at = a["in.h.level"].tolist().index(50)
    embedding, noise = a["in.h.embedding"][at], a["in.h.noise"][at]
    mixed = np.concatenate([embedding, np.full_like(embedding, 7)])
    got = Augmentor.squaredcos_cap_v2(1000).again(mixed, 50, noise)
    np.testing.assert_allclose(got, a["out.h.y"][at], rtol=0, atol=BIT * 52)


@pytest.mark.parametrize("level", [-1, 351, 20.0, "20", None, True, float("nan")])
def test_levels_out_of_range(level):
    x = np.zeros((3, 4, 4), np.float32)
    with pytest.raises(RequestError, match="takes a whole number from 0 to 350") as caught:
        upscaler().noised(x, level, x)
    assert "--noise-level 0 to 350" in caught.value.hint


def test_levels_at_the_ends():
    made = Augmentor.squaredcos_cap_v2(1000)
    x = np.ones(8, np.float32)
    assert made.noised(x, np.int64(999), 0 * x)[0] == pytest.approx(4.9e-5, rel=0.01)  # acp 2.4e-9
    with pytest.raises(RequestError, match="0 to 999"):
        made.noised(x, 1000, x)


@pytest.mark.parametrize(
    ("weights", "said", "hint"),
    [
        ([1.0, -1.0], "1, -1 sum to 0", "change one --weight"),
        ([0.1 + 0.2, -0.3], "sum to 0", "change one --weight"),
        ([0.0, 0.0], "0, 0 sum to 0", "change one --weight"),
        ([1.0, float("nan")], "1, nan are not all finite", "as a number such as 0.6"),
        ([1.0], "2 pictures and 1 weights", "one --weight for each --image"),
    ],
)
def test_weights_that_give_no_average(weights, said, hint):
    with pytest.raises(RequestError, match=said) as caught:
        mix(np.ones((2, 6), np.float32), weights)
    assert hint in caught.value.hint


def test_nothing_to_mix():
    with pytest.raises(RequestError, match="0 pictures and 0 weights"):
        mix([], [])


ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (ONES, None),
        (None, ONES),
        (ONES, ONES[:3]),
        (np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)),
        (ONES, 0 * ONES),
        (ONES * np.float32("nan"), ONES),
    ],
)
def test_statistics_that_are_none(mean, std):
    with pytest.raises(RequestError, match="not a mean and a deviation") as caught:
        Augmentor.squaredcos_cap_v2(1000, mean, std)
    assert "statistics file" in caught.value.hint


def test_statistics_of_another_tower():
    made = Augmentor.squaredcos_cap_v2(1000, ONES, ONES)
    with pytest.raises(RequestError, match=r"have 4 numbers.* has \[6\]") as caught:
        made.class_vector(np.ones(6, np.float32), 0, np.ones(6, np.float32))
    assert "this image tower" in caught.value.hint
