"""Pictures and masks on the model's canvas: geometry, polarity, threshold, thin strokes, paste."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from sdengine.engine.errors import RequestError, UnknownName
from sdengine.engine.inputs import (
    latent_mask,
    open_mask,
    paste,
    pixels_of,
    place,
    place_mask,
)

sides = st.integers(1, 90)
modes = st.sampled_from(["fit", "fill", "stretch"])


def noise(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def put(pixels: np.ndarray, width=None, height=None, resize="fit", multiple=8, least=8):
    options = {"resize": resize, "multiple": multiple, "least": least}
    return place(Image.fromarray(pixels), width=width, height=height, **options)


class TestPlace:
    @settings(deadline=None, max_examples=60)
    @given(sides, sides, st.sampled_from([1, 8, 32]), st.sampled_from([1, 8, 64]), modes)
    def test_own_size_round_trip(self, height, width, multiple, least, resize):
        """Nothing resized, edges repeated, and the crop gives back every pixel."""
        pixels = noise(height, width)
        placed = put(pixels, resize=resize, multiple=multiple, least=least)
        canvas = placed.pixels.shape[1:]
        assert all(side % multiple == 0 and side >= least for side in canvas)
        assert all(max(own, least) <= side < max(own, least) + multiple
                   for own, side in zip((height, width), canvas, strict=True))  # fmt: skip
        assert placed.size == (height, width)
        np.testing.assert_array_equal(np.asarray(placed.image), pixels)
        whole = np.rint((placed.pixels.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(placed.crop(whole), pixels)
        y, x = (
            np.minimum(np.arange(canvas[0]), height - 1),
            np.minimum(np.arange(canvas[1]), width - 1),
        )
        np.testing.assert_array_equal(whole, pixels[np.ix_(y, x)])

    @settings(deadline=None, max_examples=60)
    @given(sides, sides, sides, sides, modes)
    def test_sizes(self, height, width, asked_height, asked_width, resize):
        placed = put(noise(height, width), asked_width, asked_height, resize)
        h, w = placed.size
        assert placed.image.size == (w, h)
        assert np.isfinite(placed.pixels).all()
        if resize != "fit":
            assert (h, w) == (asked_height, asked_width)
            return
        assert 1 <= h <= asked_height
        assert 1 <= w <= asked_width
        assert h == asked_height or w == asked_width
        scale = min(asked_height / height, asked_width / width)
        assert abs(h - height * scale) <= 0.5 or h == 1
        assert abs(w - width * scale) <= 0.5 or w == 1

    def test_stretch_is_lanczos(self):
        image = Image.fromarray(noise(30, 50))
        placed = place(image, width=71, height=20, resize="stretch", multiple=8, least=8)
        want = np.asarray(image.resize((71, 20), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(np.asarray(placed.image), want)

    @pytest.mark.parametrize(
        ("size", "shown"),
        [((40, 20), np.s_[10:30, 0:40]), ((20, 40), np.s_[0:40, 10:30])],
    )
    def test_fill_cuts_both_sides_off(self, size, shown):
        pixels = noise(40, 40)
        placed = put(pixels, *size, resize="fill")
        np.testing.assert_array_equal(np.asarray(placed.image), pixels[shown])

    def test_fill_keeps_proportions(self):
        """A disc stays a disc: its extent in both directions is the same."""
        y, x = np.mgrid[:200, :100]
        disc = np.where((y - 99.5) ** 2 + (x - 49.5) ** 2 < 40**2, 255, 0).astype(np.uint8)
        placed = put(np.repeat(disc[..., None], 3, -1), 64, 64, "fill")
        seen = np.asarray(placed.image)[..., 0] > 127
        assert abs(int(seen.any(0).sum()) - int(seen.any(1).sum())) <= 1
        assert seen.any(0).sum() == pytest.approx(80 * 0.64, abs=1.5)

    @pytest.mark.parametrize("resize", ["fit", "fill", "stretch"])
    def test_one_side_keeps_proportions(self, resize):
        assert put(noise(30, 60), width=20, resize=resize).size == (10, 20)
        assert put(noise(30, 60), height=45, resize=resize).size == (45, 90)
        assert put(noise(1, 90), width=8, resize=resize).size == (1, 8)

    @pytest.mark.parametrize("scale", [1, 4])
    def test_crop_of_an_enlarged_canvas(self, scale):
        placed = put(noise(10, 13), multiple=16)
        made = noise(16 * scale, 16 * scale, 9)
        np.testing.assert_array_equal(placed.crop(made), made[: 10 * scale, : 13 * scale])
        with pytest.raises(AssertionError, match="canvas 16 x 16"):
            placed.crop(noise(16, 24))

    @pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2000)])
    @pytest.mark.parametrize("resize", ["fit", "fill", "stretch"])
    def test_extreme_shapes(self, size, resize):
        placed = put(noise(*size), 96, 64, resize, multiple=64, least=128)
        assert placed.pixels.shape == (3, 128, 128)
        assert np.isfinite(placed.pixels).all()
        assert np.abs(placed.pixels).max() <= 1

    def test_unknown_resize(self):
        with pytest.raises(UnknownName, match="'fil'") as caught:
            put(noise(4, 4), resize="fil")
        assert "fill" in caught.value.hint


class TestOpenMask:
    def test_white_is_repainted_and_the_threshold(self):
        mask = open_mask(np.array([[0, 127, 128, 255]], np.uint8), (1, 4))
        assert mask.dtype == np.float32
        assert (mask >= 0.5).tolist() == [[False, False, True, True]]
        np.testing.assert_allclose(mask, np.array([[0, 127, 128, 255]]) / 255)

    def test_inverted(self):
        mask = open_mask(np.array([[0, 127, 128, 255]], np.uint8), (1, 4), invert=True)
        assert (mask >= 0.5).tolist() == [[True, True, False, False]]
        assert mask[0, [0, 3]].tolist() == [1, 0]

    @pytest.mark.parametrize("level", [0, 255])
    def test_all_of_one(self, level):
        mask = open_mask(np.full((5, 7), level, np.uint8), (9, 11), blur=3)
        assert mask.shape == (9, 11)
        assert (mask == level / 255).all()

    def test_another_size_takes_the_nearest(self):
        small = np.array([[0, 255, 0], [255, 127, 128]], np.uint8)
        made = open_mask(small, (8, 9))
        np.testing.assert_array_equal(made * 255, small.repeat(4, 0).repeat(3, 1))
        assert set(np.unique(open_mask(noise(97, 61)[..., 0] // 128 * 255, (33, 40)))) == {0, 1}

    def test_colour_counts_by_lightness_and_alpha_not(self):
        rgba = np.zeros((1, 3, 4), np.uint8)
        rgba[0] = [[255, 255, 255, 0], [255, 0, 0, 255], [0, 255, 0, 9]]
        made = open_mask(rgba, (1, 3))
        np.testing.assert_allclose(made, [[1, 76 / 255, 150 / 255]], atol=1e-6)

    def test_palette_with_opacities(self):
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 255, 255, 255])
        image.putdata([0, 1])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", transparency=b"\x80\x00")
        assert open_mask(buffer.getvalue(), (1, 2)).tolist() == [[0, 1]]
        alpha = open_mask(buffer.getvalue(), (1, 2), use_alpha=True)
        np.testing.assert_allclose(alpha, [[128 / 255, 0]])

    def test_sixteen_bit(self):
        deep = np.array([[0, 32639, 32896, 65535]], np.uint16)  # 127 x 257, 128 x 257
        buffer = io.BytesIO()
        Image.fromarray(deep).save(buffer, "PNG")
        assert (open_mask(buffer.getvalue(), (1, 4)) >= 0.5).tolist() == [
            [False, False, True, True]
        ]

    def test_alpha(self):
        rgba = noise(4, 4)[..., [0, 1, 2, 0]]
        made = open_mask(rgba, (4, 4), use_alpha=True)
        np.testing.assert_array_equal(made, rgba[..., 3] / np.float32(255))
        with pytest.raises(RequestError, match="no alpha channel") as caught:
            open_mask(noise(4, 4), (4, 4), use_alpha=True)
        assert "lightness" in caught.value.hint

    @pytest.mark.parametrize("sigma", [1.0, 4.0])
    def test_blur_is_gaussian(self, sigma):
        """Across a straight edge: the Gaussian's integral, within 0.03 (Pillow adds up boxes)."""
        step = np.zeros((64, 64), np.uint8)
        step[:, 32:] = 255
        made = open_mask(step, (64, 64), blur=sigma)
        places = (np.arange(64) - 31.5) / sigma
        want = [(1 + math.erf(p / math.sqrt(2))) / 2 for p in places]
        np.testing.assert_allclose(made, np.tile(want, (64, 1)), atol=0.03)
        assert (made[:, :8] == 0).all()

    @settings(deadline=None, max_examples=60)
    @given(arrays.arrays(np.uint8, (12, 17)), st.floats(0.1, 30))
    def test_blur_never_changes_what_the_network_repaints(self, mask, blur):
        hard = open_mask(mask, (12, 17)) >= 0.5
        np.testing.assert_array_equal(open_mask(mask, (12, 17), blur=blur) >= 0.5, hard)

    @pytest.mark.parametrize("blur", [-1, math.nan, math.inf, 1001, 1e300])
    def test_impossible_blur(self, blur):
        with pytest.raises(RequestError, match="blur is") as caught:
            open_mask(np.zeros((2, 2), np.uint8), (2, 2), blur=blur)
        assert "0 for a hard edge" in caught.value.hint


class TestPlaceMask:
    @settings(deadline=None, max_examples=60)
    @given(arrays.arrays(np.uint8, st.tuples(sides, sides)), st.sampled_from(["nearest", "max"]))
    def test_unresized_is_untouched_and_padded_by_its_edge(self, levels, thin):
        mask = open_mask(levels, levels.shape)
        placed = put(np.repeat(levels[..., None], 3, -1), multiple=32)
        made = place_mask(mask, placed, thin=thin)
        np.testing.assert_array_equal(made.paste, mask)
        height, width = placed.pixels.shape[1:]
        around = ((0, height - mask.shape[0]), (0, width - mask.shape[1]))
        np.testing.assert_array_equal(made.network, np.pad(levels >= 128, around, mode="edge"))

    @settings(deadline=None, max_examples=80)
    @given(st.integers(8, 60), st.integers(8, 60), sides, sides, modes,
           st.sampled_from(["nearest", "max"]))  # fmt: skip
    def test_any_geometry(self, height, width, asked_height, asked_width, resize, thin):
        mask = open_mask(noise(height, width)[..., 0], (height, width), blur=1)
        placed = put(noise(height, width), asked_width, asked_height, resize, multiple=16)
        made = place_mask(mask, placed, thin=thin)
        assert made.network.shape == placed.pixels.shape[1:]
        assert made.paste.shape == placed.size
        assert set(np.unique(made.network)) <= {0, 1}
        assert made.paste.min() >= 0
        assert made.paste.max() <= 1
        h, w = placed.size
        np.testing.assert_array_equal(made.network[:h, :w] == 1, made.paste >= 0.5)
        for level in (0.0, 1.0):
            flat = place_mask(np.full_like(mask, level), placed, thin=thin)
            assert (flat.network == level).all()
            np.testing.assert_allclose(flat.paste, level, atol=1e-6)

    @pytest.mark.parametrize("resize", ["fit", "fill", "stretch"])
    @pytest.mark.parametrize("thin", ["nearest", "max"])
    def test_lies_where_the_picture_lies(self, resize, thin):
        """A white square on black, as picture and as mask: the same edges after any resize."""
        square = np.zeros((90, 140), np.uint8)
        square[30:60, 50:100] = 255
        placed = put(np.repeat(square[..., None], 3, -1), 112, 96, resize)
        seen = np.asarray(placed.image)[..., 0] >= 128
        made = place_mask(open_mask(square, (90, 140)), placed, thin=thin).paste >= 0.5
        for axis in (0, 1):
            a, b = (np.flatnonzero(m.any(axis)) for m in (seen, made))
            assert abs(a[0] - b[0]) <= (thin == "max")
            assert abs(a[-1] - b[-1]) <= (thin == "max")

    def test_a_thin_stroke_survives_shrinking(self):
        mask = np.zeros((400, 400), np.float32)
        mask[201, :] = 1
        placed = put(noise(400, 400), 64, 64)
        assert not place_mask(mask, placed).network.any()
        kept = place_mask(mask, placed, thin="max")
        assert kept.network.sum(0).tolist() == [1] * 64
        assert kept.paste.max() == 1

    def test_unknown_way(self):
        with pytest.raises(UnknownName, match="'mean'") as caught:
            place_mask(np.zeros((8, 8), np.float32), put(noise(8, 8)), thin="mean")
        assert "nearest" in caught.value.hint


class TestLatentMask:
    @pytest.mark.parametrize("factor", [4, 8])
    def test_nearest_takes_the_first_pixel_of_a_cell(self, factor):
        mask = (noise(8 * factor, 5 * factor)[..., 0] > 127).astype(np.float32)
        made = latent_mask(mask, factor, thin="nearest")
        np.testing.assert_array_equal(made, mask[None, ::factor, ::factor])
        assert made.dtype == np.float32

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 63), st.integers(0, 63))
    def test_max_keeps_a_single_pixel(self, y, x):
        mask = np.zeros((64, 64), np.float32)
        mask[y, x] = 1
        assert np.argwhere(latent_mask(mask, 8, thin="max")[0]).tolist() == [[y // 8, x // 8]]
        kept = latent_mask(mask, 8, thin="nearest").sum()
        assert kept == (y % 8 == 0 and x % 8 == 0)

    def test_the_result_is_its_own(self):
        mask = np.zeros((8, 8), np.float32)
        latent_mask(mask, 8, thin="nearest")[:] = 1
        assert not mask.any()

    def test_mistakes(self):
        with pytest.raises(UnknownName, match="'min'"):
            latent_mask(np.zeros((8, 8), np.float32), 8, thin="min")
        with pytest.raises(AssertionError, match="multiple of 8"):
            latent_mask(np.zeros((8, 9), np.float32), 8, thin="max")


class TestPaste:
    @settings(deadline=None, max_examples=40)
    @given(arrays.arrays(np.float32, (6, 7), elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1])))
    def test_exact_outside_and_inside(self, mask):
        original, made = noise(6, 7), noise(6, 7, 2)
        result = paste(original, made, mask)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result[mask == 0], original[mask == 0])
        np.testing.assert_array_equal(result[mask == 1], made[mask == 1])
        want = original + mask[..., None].astype(float) * (made.astype(float) - original)
        assert np.abs(result - want).max() <= 0.5

    def test_black_and_white_levels_stay_within(self):
        black, white = np.zeros((1, 256, 3), np.uint8), np.full((1, 256, 3), 255, np.uint8)
        mask = open_mask(np.arange(256, dtype=np.uint8)[None], (1, 256))
        np.testing.assert_array_equal(paste(black, white, mask)[0, :, 1], np.arange(256))
        np.testing.assert_array_equal(paste(white, black, mask)[0, :, 1], np.arange(256)[::-1])

    def test_sizes_must_agree(self):
        with pytest.raises(AssertionError, match="one size"):
            paste(noise(4, 4), noise(4, 4), np.zeros((4, 5), np.float32))


def test_a_whole_inpainting_leaves_the_rest_alone():
    """Odd size, a mask of another size, blurred: where it is 0 the picture is the original's."""
    pixels = noise(77, 53)
    placed = put(pixels, multiple=64, least=64)
    drawn = np.zeros((20, 20), np.uint8)
    drawn[8:, 6:16] = 255
    mask = place_mask(open_mask(drawn, (77, 53), blur=2), placed)
    network = 255 - (placed.pixels.transpose(1, 2, 0) + 1) * 127.5
    result = paste(np.asarray(placed.image), placed.crop(network.astype(np.uint8)), mask.paste)
    assert 0 < (mask.paste == 0).mean() < 1
    np.testing.assert_array_equal(result[mask.paste == 0], pixels[mask.paste == 0])
    assert (result != pixels)[mask.paste == 1].mean() > 0.9
    assert pixels_of(Image.fromarray(result)).shape == (3, 77, 53)
