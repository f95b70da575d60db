"""The invisible mark against the package that it comes from, and laws that it must keep.

The package is no dependency of the tests: it wants torch and a window system. Where it can be
imported, it is the reference; `pip install --no-deps invisible-watermark opencv-python-headless
PyWavelets` brings it. The pictures in tests/golden were made by it.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sdengine.engine import watermark
from sdengine.engine.errors import RequestError


@pytest.fixture(scope="module")
def original():
    """`mark(rgb) -> rgb`, `read(rgb) -> bits` of the package invisible-watermark."""
    reason = "needs invisible-watermark, opencv-python-headless and PyWavelets, without their own"
    pytest.importorskip("cv2", reason=reason)
    pytest.importorskip("pywt", reason=reason)
    imwatermark = pytest.importorskip("imwatermark", reason=reason)
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bytes", b"SDV2")
    decoder = imwatermark.WatermarkDecoder("bits", 32)

    def mark(rgb):
        return encoder.encode(np.ascontiguousarray(rgb[..., ::-1]), "dwtDct")[..., ::-1]

    def read(rgb):
        return [int(b) for b in decoder.decode(np.ascontiguousarray(rgb[..., ::-1]), "dwtDct")]

    return mark, read


def picture(seed: int, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Noise with a spectrum like a photograph's, in colours of its own, often saturated."""
    rng = np.random.default_rng(seed)
    h = int(rng.integers(256, 400)) if height is None else height
    w = int(rng.integers(256, 400)) if width is None else width
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    frequency[0, 0] = 1
    fall = frequency ** rng.uniform(0.8, 2.2)
    planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((h, w))) / fall).real for _ in range(3)]
    planes = [p / p.std() for p in planes]
    grey = rng.uniform(0, 1)
    mixed = np.stack([planes[0] * grey + p * (1 - grey) for p in planes], -1)
    levels = mixed * rng.uniform(20, 70) + rng.uniform(60, 200, 3)
    return np.clip(levels, 0, 255).astype(np.uint8)


class TestAgainstTheOriginal:
    @pytest.mark.slow
    def test_a_hundred_pictures(self, original):
        """Pixel for pixel, so its decoder reads from ours what it reads from its own."""
        mark, read = original
        ours = theirs = 0
        for seed in range(100):
            before = picture(seed)
            made, want = watermark.encode(before), mark(before)
            np.testing.assert_array_equal(made, want)
            assert watermark.decode(made)[0] == read(want)
            ours += watermark.agreeing(read(made))
            theirs += watermark.agreeing(read(want))
        assert ours >= theirs > 100 * 24

    @pytest.mark.parametrize(
        "size", [(256, 256), (257, 259), (8, 8193), (8200, 9), (255, 258), (1030, 70)]
    )
    def test_odd_sizes(self, original, size):
        mark, read = original
        before = picture(7, *size)
        made = watermark.encode(before)
        np.testing.assert_array_equal(made, mark(before))
        assert watermark.decode(made)[0] == read(made)

    @pytest.mark.parametrize("colour", ["white", "black", "red", "lime", "blue", "yellow", "cyan"])
    def test_saturated_colours(self, original, colour):
        flat = np.asarray(Image.new("RGB", (300, 280), colour))
        np.testing.assert_array_equal(watermark.encode(flat), original[0](flat))


def test_every_colour_is_converted_within_its_range():
    """The U plane stays far enough from 0 and 255 for the mark to move it by 14 either way."""
    levels = np.array([0, 1, 127, 254, 255], np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    y, u, v = watermark._yuv(cube)
    assert 14 <= u.min() <= u.max() <= 241
    assert min(y.min(), v.min()) >= 0
    assert max(y.max(), v.max()) <= 255


def test_grey_of_the_video_standard():
    """Y = 0.299 R + 0.587 G + 0.114 B, U = 0.492 (B - Y) + 128, V = 0.877 (R - Y) + 128."""
    rgb = picture(3)
    r, g, b = (rgb[..., k].astype(float) for k in range(3))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    y, u, v = watermark._yuv(rgb)
    assert np.abs(y - luma).max() < 0.51
    assert np.abs(u - np.clip(0.492 * (b - luma) + 128, 0, 255)).max() < 1
    assert np.abs(v - np.clip(0.877 * (r - luma) + 128, 0, 255)).max() < 1


def test_a_plain_picture_gives_all_bits_back():
    for level in (0, 90, 128):
        bits, text = watermark.decode(watermark.encode(np.full((256, 300, 3), level, np.uint8)))
        assert np.packbits(bits).tobytes() == b"SDV2"
        assert text == "SDV2"


def test_unmarked_pictures_say_nothing():
    assert [watermark.decode(picture(seed))[1] for seed in range(10)] == [None] * 10


def test_marked_pictures_are_mostly_found():
    found = [watermark.decode(watermark.encode(picture(seed)))[1] for seed in range(10)]
    assert set(found) <= {"SDV2", None}
    assert found.count("SDV2") >= 5


def test_the_mark_survives_a_png_file():
    marked = watermark.encode(picture(4))
    buffer = io.BytesIO()
    Image.fromarray(marked).save(buffer, "PNG")
    assert watermark.decode(np.asarray(Image.open(buffer))) == watermark.decode(marked)


@pytest.mark.parametrize("stripe", [1, 2**12, 2**30])
def test_stripes_do_not_show(monkeypatch, stripe):
    before = picture(5, 331, 402)
    want = watermark.encode(before)
    monkeypatch.setattr(watermark, "STRIPE", stripe)
    np.testing.assert_array_equal(watermark.encode(before), want)


def test_the_picture_is_left_as_it_was():
    before = picture(6)
    kept = before.copy()
    assert watermark.encode(before) is not before
    np.testing.assert_array_equal(before, kept)


def test_an_array_in_another_order():
    """A cut-out of a larger picture, and read-only."""
    large = picture(8, 300, 300)
    large.flags.writeable = False
    cut = large[10:290:1, 5:290]
    np.testing.assert_array_equal(watermark.encode(cut), watermark.encode(cut.copy()))


@pytest.mark.parametrize(("height", "width", "large"), [
    (256, 256, True), (255, 257, False), (255, 256, False), (128, 512, True), (8, 8192, True),
    (7, 10_000, False), (100_000, 1, False), (1, 1, False),
])  # fmt: skip
def test_what_is_large_enough(height, width, large):
    assert watermark.fits(height, width) == large
    pixels = np.full((height, width, 3), 77, np.uint8)
    if large:
        assert watermark.encode(pixels).shape == pixels.shape
        return
    with pytest.raises(RequestError, match=f"{width} x {height} pixels is too small") as caught:
        watermark.encode(pixels)
    assert "--no-watermark" in caught.value.hint


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 8), (9, 40)])
def test_reading_a_tiny_picture(size):
    """No block, or fewer than there are bits: nothing is found, nothing divides by 0."""
    noise = np.random.default_rng(2).integers(0, 256, (*size, 3)).astype(np.uint8)
    bits, text = watermark.decode(noise)
    assert len(bits) == 32
    assert text is None
    assert sum(bits) <= (size[0] // 8) * (size[1] // 8)
