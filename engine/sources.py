"""Files, bytes, arrays and opened pictures, read upright and whole, or refused with a reason.

checked by  tests/unit/test_inputs.py
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, UnidentifiedImageError

from .errors import RequestError, StorageError

Source = Path | str | bytes | Image.Image | NDArray[Any]

MAX_PIXELS = 2**26  # 8192 x 8192: what one picture may unpack to, 200 MB as RGB

# Formats of pixels alone. Others (EPS, WMF) would start a foreign program to draw themselves, and
# icons (ICO, ICNS) hold pictures larger than the size that they state.
FORMATS = frozenset("AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split())

ORIENTATION = 0x0112  # EXIF tag -> what turns the picture upright; 1, and what is unknown, nothing
UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Grey of more than 8 bit: which value may be white. The first that holds all of the picture is
# taken, so that nothing is clipped; the type alone does not say it (F is 0..1, or 0..255, or ...).
WHITE: Mapping[str, tuple[float, ...]] = {"I": (65_535, 2**31 - 1), "F": (1, 255, 65_535)}


def read(source: Source) -> Image.Image:
    """Loaded and upright, in whatever mode it has.

    raises   RequestError for what is not a picture, is truncated or holds more than MAX_PIXELS;
             StorageError for a file that cannot be read
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _loaded(source, named(source))
    if not isinstance(source, (str, bytes, Path)):
        raise RequestError(
            f"a picture cannot be read from {type(source).__name__}",
            hint="give a path, the bytes of a picture file, a Pillow image or an array of uint8",
        )
    name = named(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format not in FORMATS:
                raise RequestError(
                    f"{name} is a file of format {image.format}, which is not read",
                    hint="save it as PNG, JPEG or WebP",
                )
            return _loaded(image, name)
    except (RequestError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(
            f"{name} is too large: {error}", hint=_TOO_LARGE.format(MAX_PIXELS)
        ) from None
    except OSError as error:
        if error.errno is None:  # Pillow's own: not identified
            raise _broken(name, error) from None
        raise StorageError(
            f"cannot read {name}: {error.strerror}",
            hint="check the path and that you may read the file",
        ) from None
    except Exception as error:  # whatever a decoder may stumble over in a damaged file
        raise _broken(name, error) from None


_TOO_LARGE = "make it smaller first: at most {0:,} pixels are unpacked, 8192 x 8192"


def named(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    return "the encoded picture" if isinstance(source, bytes) else "the picture given"


def _broken(name: str, error: Exception) -> RequestError:
    what = str(error) if str(error) else type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        what = "it begins like no known picture format"
    return RequestError(
        f"not a picture that can be read: {name}: {what}",
        hint="give an intact PNG, JPEG, WebP, GIF, BMP or TIFF file",
    )


def _loaded(image: Image.Image, name: str) -> Image.Image:
    check_size(name, image.width, image.height)  # before anything is unpacked
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # truncated or damaged: OSError, SyntaxError, ValueError, ...
        raise _broken(name, error) from None
    turn = UPRIGHT.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"{name} is too large: {width} x {height} pixels", hint=_TOO_LARGE.format(MAX_PIXELS)
        )
    if width * height == 0:
        raise RequestError(
            f"{name} is empty: {width} x {height} pixels", hint="give a picture with pixels in it"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF is a decoration: where it is damaged, the picture is still a picture
        return 1


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise RequestError(
            f"the picture array is {array.dtype} {list(shape)}",
            hint="give uint8 [height, width], [height, width, 3] (RGB) or [height, width, 4]"
            " (RGBA) of 0 to 255",
        )
    check_size("the picture array", shape[1], shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey to L, or LA where a grey value is declared transparent."""
    kind = "I;16" if image.mode.startswith("I;16") else image.mode
    if kind not in ("I;16", "I", "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    white = next((w for w in WHITE.get(kind, (65_535,)) if high <= w), None)
    if white is None or not low >= 0:  # NaN is neither
        known = " or ".join(f"0..{w:g}" for w in WHITE.get(kind, (65_535,)))
        raise RequestError(
            f"the grey values of the picture ({image.mode}) reach from {low:g} to {high:g};"
            f" expected {known}",
            hint="save it as an 8-bit or 16-bit PNG",
        )
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(values == clear, 0, 255)], -1).astype(np.uint8))


def lightness(image: Image.Image) -> Image.Image:
    """L of the colours; where the picture is transparent, of those that lie hidden there."""
    if image.has_transparency_data:
        image = converted(image, "RGBA")
    return converted(converted(image, "RGB"), "L")


def opacity(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        raise RequestError(
            f"the mask has no alpha channel (it is {image.mode})",
            hint="save the mask with transparency, or use its lightness (white is repainted)",
        )
    return converted(image, "RGBA").getchannel("A")


def converted(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError as error:
        raise RequestError(
            f"a picture of mode {image.mode} cannot be made {mode}: {error}",
            hint="save it as an RGB picture",
        ) from None


def colour_of(name: str) -> tuple[int, ...]:
    try:
        colour = ImageColor.getrgb(name)
    except ValueError:
        raise RequestError(
            f"unknown background colour {name!r}",
            hint="give a colour name such as white or grey, or #rrggbb",
        ) from None
    if len(colour) != 3:
        raise RequestError(
            f"the background colour {name!r} is transparent itself",
            hint="give an opaque colour: a name such as white, or #rrggbb",
        )
    return (*colour, 255)
