"""Pictures of every kind that people have: read as meant, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageOps, PngImagePlugin

from sdengine.engine import sources
from sdengine.engine.errors import RequestError, StorageError
from sdengine.engine.inputs import open_depth, open_mask, open_picture, pixels_of

ORIENTATION = 0x0112


def ramp(height: int = 24, width: int = 40) -> np.ndarray:
    """Not the same upside down, mirrored, turned or with colours exchanged."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, 40 + x + y], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(source, **options) -> np.ndarray:
    image = open_picture(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from its parts, for kinds that Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    lengths = [(struct.pack(">I", len(d)), k, d, struct.pack(">I", zlib.crc32(k + d)))
               for k, d in parts]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(part) for part in lengths)


def refused(match: str, hint: str, call, *args, kind=RequestError, **options) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(*args, **options)
    assert hint in caught.value.hint


class TestSources:
    def test_all_kinds_of_source_are_one_picture(self, tmp_path):
        want = ramp()
        image = Image.fromarray(want)
        path = tmp_path / "a.png"
        path.write_bytes(encoded(image))
        for source in (path, str(path), path.read_bytes(), image, Image.open(path), want):
            np.testing.assert_array_equal(read(source), want)
        np.testing.assert_array_equal(read(want[..., 0]), np.repeat(want[..., :1], 3, -1))

    def test_the_source_is_left_as_it_was(self):
        image = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
        image.getexif()[ORIENTATION] = 6
        before = image.tobytes(), image.size
        open_picture(image)
        assert (image.tobytes(), image.size) == before

    def test_a_file_is_closed_after_reading(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(encoded(Image.fromarray(ramp())))
        open_picture(path)  # a file left open is a ResourceWarning, and warnings are errors
        path.unlink()

    @pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1)])
    def test_thin_and_tiny(self, size):
        pixels = pixels_of(open_picture(Image.new("L", size, 51)))
        assert pixels.shape == (3, size[1], size[0])
        np.testing.assert_allclose(pixels, 51 / 127.5 - 1, atol=1e-7)

    def test_pixels(self):
        want = ramp().transpose(2, 0, 1) / 127.5 - 1
        pixels = pixels_of(Image.fromarray(ramp()))
        assert pixels.dtype == np.float32
        assert pixels.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(pixels, want, atol=1e-7)


class TestTransparency:
    @pytest.mark.parametrize(
        ("background", "behind"),
        [(None, (255, 255, 255)), ("black", (0, 0, 0)), ("#0a14fe", (10, 20, 254))],
    )
    def test_composited(self, background, behind):
        """colour * alpha + background * (1 - alpha), to the nearest level."""
        colours = np.random.default_rng(5).integers(0, 256, (16, 16, 4)).astype(np.uint8)
        colours[..., 3] = np.arange(256).reshape(16, 16)
        options = {} if background is None else {"background": background}
        made = read(encoded(Image.fromarray(colours)), **options)
        alpha = colours[..., 3:] / 255
        want = colours[..., :3] * alpha + np.array(behind) * (1 - alpha)
        assert np.abs(made - want).max() <= 1
        np.testing.assert_array_equal(made[0, 0], behind)
        np.testing.assert_array_equal(made[15, 15], colours[15, 15, :3])

    def test_hidden_colours_do_not_appear(self):
        hidden = np.zeros((4, 4, 4), np.uint8)
        hidden[..., 0] = 200
        assert (read(hidden) == 255).all()

    @pytest.mark.parametrize("mode", ["LA", "PA", "RGBa"])
    def test_other_modes_with_alpha(self, mode):
        if mode == "PA":
            image = Image.new("P", (2, 1))
            image.putpalette([90] * 3)
        else:
            image = Image.new("L" if mode == "LA" else "RGB", (2, 1), (90,) * len(mode[:-1]))
        image.putalpha(Image.frombytes("L", (2, 1), b"\xff\0"))
        np.testing.assert_array_equal(read(image.convert(mode)), [[[90] * 3, [255] * 3]])

    def test_a_mode_that_pillow_does_not_convert(self):
        image = Image.new("LA", (2, 1)).convert("La")
        refused("mode La", "save it as an RGB picture", open_picture, image)

    @pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
    def test_palette(self, transparency):
        """One index made transparent, or an opacity for each index."""
        image = Image.new("P", (3, 1))
        image.putpalette([9, 8, 7, 100, 110, 120, 1, 2, 3])
        image.putdata([0, 1, 2])
        data = encoded(image, transparency=transparency)
        np.testing.assert_array_equal(read(data), [[[9, 8, 7], [255] * 3, [1, 2, 3]]])
        np.testing.assert_array_equal(read(data, background="red")[0, 1], [255, 0, 0])

    @pytest.mark.parametrize(
        ("image", "key", "at"),
        [
            (Image.fromarray(ramp()), (6, 10, 42), (1, 1)),
            (Image.fromarray(ramp()[..., 0]), 12, (0, 2)),
            (Image.fromarray(ramp()[..., 0] > 100), 0, (0, 0)),
        ],
    )
    def test_a_colour_declared_transparent(self, image, key, at):
        made = read(encoded(image, transparency=key), background="#0102fe")
        np.testing.assert_array_equal(made[at], [1, 2, 254])
        np.testing.assert_array_equal(made[20, 39], np.asarray(image.convert("RGB"))[20, 39])

    def test_a_deep_grey_declared_transparent(self):
        rows = b"\0" + struct.pack(">3H", 0, 300, 65535)
        data = png(3, 1, 16, 0, (b"tRNS", struct.pack(">H", 300)), (b"IDAT", zlib.compress(rows)))
        made = read(data, background="red")
        np.testing.assert_array_equal(made, [[[0] * 3, [255, 0, 0], [255] * 3]])

    @pytest.mark.parametrize("name", ["whiteish", "", "#12345", "rgb(1,2"])
    def test_unknown_background(self, name):
        refused("unknown background", "#rrggbb", open_picture, ramp(), background=name)

    def test_transparent_background(self):
        refused("transparent", "opaque", open_picture, ramp(), background="#11223344")


class TestOrientation:
    @pytest.mark.parametrize("number", range(10))
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
    def test_as_pillow_turns_it(self, number, kind):
        exif = Image.Exif()
        exif[ORIENTATION] = number
        data = encoded(Image.fromarray(ramp()), kind, exif=exif)
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        made = open_picture(data)
        assert made.size == ((24, 40) if number in (5, 6, 7, 8) else (40, 24))
        np.testing.assert_array_equal(np.asarray(made), np.asarray(want))

    def test_a_phone_held_upright(self):
        """Number 6: stored on its left side; the stored left bottom corner is the left top."""
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        made = read(encoded(Image.fromarray(ramp()), exif=exif))
        np.testing.assert_array_equal(made[0, 0], ramp()[-1, 0])
        np.testing.assert_array_equal(made[0, -1], ramp()[0, 0])

    def test_opened_twice_is_turned_once(self):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        once = open_picture(encoded(Image.fromarray(ramp()), exif=exif))
        np.testing.assert_array_equal(read(once), np.asarray(once))

    def test_masks_and_depth_are_turned_too(self):
        exif = Image.Exif()
        exif[ORIENTATION] = 3
        grey = ramp()[..., 0]
        data = encoded(Image.fromarray(grey), exif=exif)
        np.testing.assert_array_equal(open_depth(data), grey[::-1, ::-1])
        np.testing.assert_array_equal(open_mask(data, (24, 40)), grey[::-1, ::-1] / np.float32(255))

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0rubbish" * 9])
    def test_damaged_exif_is_no_reason_to_refuse(self, exif):
        data = encoded(Image.fromarray(ramp()), "PNG", exif=exif)
        np.testing.assert_array_equal(read(data), ramp())


class TestModes:
    @pytest.mark.parametrize(
        ("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("PPM", np.int32)]
    )
    def test_sixteen_bit_grey(self, kind, dtype):
        """Every value: v / 257 to the nearest level, white stays white, nothing is clipped."""
        values = np.arange(65536).reshape(256, 256)
        made = read(encoded(Image.fromarray(values.astype(dtype)), kind))
        np.testing.assert_array_equal(made[..., 1], np.rint(values / 257))

    @pytest.mark.parametrize("order", ["<u2", ">u2"])
    def test_sixteen_bit_of_either_byte_order(self, order):
        values = np.array([[0, 257, 65535]], order)
        mode = "I;16" if order == "<u2" else "I;16B"
        image = Image.frombytes(mode, (3, 1), values.tobytes())
        np.testing.assert_array_equal(read(image)[0, :, 0], [0, 1, 255])

    def test_sixteen_bit_colour(self):
        rows = b"\0" + struct.pack(">6H", 0, 32768, 65535, 257 * 9, 257 * 10, 257 * 11)
        data = png(2, 1, 16, 2, (b"IDAT", zlib.compress(rows)))
        np.testing.assert_array_equal(read(data), [[[0, 128, 255], [9, 10, 11]]])

    @pytest.mark.parametrize("white", [1, 255, 65535, 2**31 - 1])
    def test_wide_grey(self, white):
        """Float in 0..1, 0..255 or 0..65535; whole numbers of 16 or 31 bits."""
        kind = np.int32 if white > 255 else np.float32
        values = np.linspace(0, white, 12).reshape(3, 4).astype(kind)
        made = read(encoded(Image.fromarray(values), "TIFF"))
        np.testing.assert_array_equal(made[..., 0], np.rint(np.linspace(0, 255, 12)).reshape(3, 4))

    @pytest.mark.parametrize(
        ("values", "found"),
        [
            ([-0.5, 1], "-0.5 to 1"),
            ([0, 70000.0], "70000"),
            ([0, np.nan], "nan"),
            ([0, np.inf], "inf"),
        ],
    )
    def test_float_of_unknown_range(self, values, found):
        image = Image.fromarray(np.array([values], np.float32))
        refused(found, "16-bit PNG", open_picture, image)

    def test_negative_whole_numbers(self):
        image = Image.fromarray(np.array([[-1, 5]], np.int32))
        refused("from -1 to 5; expected 0..65535", "16-bit PNG", open_picture, image)

    @pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
    def test_cmyk(self, kind):
        """No ink is white, full cyan takes all red away; black ink takes everything."""
        inks = {(0, 0, 0, 0): "white", (255, 0, 0, 0): "cyan", (0, 0, 0, 255): "black"}
        for ink, colour in inks.items():
            made = read(encoded(Image.new("CMYK", (8, 8), ink), kind)).astype(int)
            assert np.abs(made - ImageColor.getrgb(colour)).max() <= (0 if kind == "TIFF" else 2)

    def test_one_bit(self):
        bits = ramp()[..., 0] > 100
        np.testing.assert_array_equal(read(encoded(Image.fromarray(bits)))[..., 2], bits * 255)

    @pytest.mark.parametrize("mode", ["HSV", "YCbCr"])
    def test_other_colour_spaces(self, mode):
        image = Image.fromarray(ramp()).convert(mode)
        assert np.abs(read(image).astype(int) - ramp()).max() <= 12

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_animated_shows_its_first_frame(self, kind):
        frames = [Image.new("RGB", (9, 7), colour) for colour in ("#102030", "red", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert (read(data) == [16, 32, 48]).all()


class TestRefusals:
    def test_no_such_file(self, tmp_path):
        for missing in (tmp_path / "a.png", str(tmp_path / "a.png")):
            refused("a.png", "check the path", open_picture, missing, kind=StorageError)
        refused(str(tmp_path), "check the path", open_picture, tmp_path, kind=StorageError)

    @pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
    def test_not_a_picture(self, data):
        refused("not a picture", "PNG, JPEG", open_picture, data)

    @pytest.mark.parametrize("source", [None, 7, 1.5, [1, 2], bytearray(b"x")])
    def test_not_a_source(self, source):
        refused(f"from {type(source).__name__}", "a path", open_picture, source)

    @pytest.mark.parametrize(
        "array",
        [np.zeros((4, 4), bool), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8),
         np.zeros((1, 4, 4, 3), np.uint8), np.zeros(4, np.uint8)],
    )  # fmt: skip
    def test_not_an_array_of_pixels(self, array):
        with pytest.raises(RequestError, match=str(array.dtype)) as caught:
            open_picture(array)
        assert "uint8 [height, width]" in caught.value.hint

    @pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0)])
    def test_empty(self, shape):
        refused("is empty", "pixels in it", open_picture, np.zeros(shape, np.uint8))

    @pytest.mark.parametrize("side", [8193, 9500, 16000, 60000])
    def test_a_bomb_is_not_unpacked(self, side):
        """Above our limit, above Pillow's warning, above Pillow's error: a header is enough."""
        data = png(side, side, 8, 2, (b"IDAT", zlib.compress(b"")))
        for call in (open_picture, open_depth):
            refused("too large", "67,108,864 pixels", call, data)

    def test_the_limit_itself_is_read(self, monkeypatch):
        monkeypatch.setattr(sources, "MAX_PIXELS", 24 * 40)
        read(ramp())
        with pytest.raises(RequestError, match="41 x 24"):
            read(ramp(24, 41))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_truncated(self, kind, tmp_path):
        noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        path = tmp_path / "half"
        path.write_bytes(data[: len(data) // 2])
        refused("half", "intact", open_picture, path)

    def test_a_format_that_draws_itself_with_other_programs(self):
        data = encoded(Image.fromarray(ramp()), "EPS")
        refused("format EPS", "PNG", open_picture, data)

    @settings(deadline=None, max_examples=150)
    @given(
        st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "TGA"]),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
        st.floats(0, 1),
    )
    def test_damage_gives_a_picture_or_a_reason(self, kind, hits, kept):
        data = bytearray(encoded(Image.fromarray(ramp()), kind))
        for place, value in hits:
            data[int(place * (len(data) - 1))] = value
        with contextlib.suppress(RequestError):
            assert open_picture(bytes(data[: int(len(data) * (0.5 + kept))])).mode == "RGB"


class TestDepth:
    def test_whiter_is_nearer_in_every_depth(self):
        values = np.arange(256).reshape(16, 16)
        for image, scale in [(values.astype(np.uint8), 1), (values.astype(np.uint16) * 257, 257),
                             ((values / 255).astype(np.float32), 1 / 255)]:  # fmt: skip
            depth = open_depth(encoded(Image.fromarray(image), "TIFF"))
            assert depth.dtype == np.float32
            np.testing.assert_allclose(depth, values * scale, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
    def test_an_array_of_numbers(self, dtype):
        values = np.array([[0, 1, 2], [50, 100, 120]], dtype)
        np.testing.assert_array_equal(open_depth(values), values)

    def test_colour_counts_by_lightness(self):
        """L = 0.299 R + 0.587 G + 0.114 B, to the nearest level; transparency does not matter."""
        rgba = np.dstack([ramp(), np.full((24, 40), 9, np.uint8)])
        want = ramp() @ [0.299, 0.587, 0.114]
        assert np.abs(open_depth(rgba) - want).max() <= 1
        np.testing.assert_array_equal(open_depth(rgba), open_depth(ramp()))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
    def test_holes(self, bad):
        values = np.ones((3, 4))
        values[1, 2] = bad
        refused("in 1 of 12 depth values", "fill the holes", open_depth, values)

    def test_refused_as_a_picture_is(self, tmp_path):
        refused("not a picture", "PNG", open_depth, b"no")
        refused("a.png", "check", open_depth, tmp_path / "a.png", kind=StorageError)
        refused("is empty", "pixels", open_depth, np.zeros((0, 3)))
        refused("complex", "uint8", open_depth, np.zeros((2, 2), complex))


def test_text_chunks_do_not_matter(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a fox")
    np.testing.assert_array_equal(read(encoded(Image.fromarray(ramp()), pnginfo=info)), ramp())
