"""Pictures, masks and depth maps in: any file that Pillow reads, made into what a model takes.

A picture is read upright (EXIF), composited where it is transparent, brought to 8 bit, resized, and
padded to the model's multiple; a mask or a depth map of any size follows the same geometry.

checked by  tests/unit/test_inputs.py, tests/golden/test_pictures.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .errors import RequestError, UnknownName
from .images import Pixels, padded_size
from .ports import Array, Floats
from .sources import Source as Source
from .sources import check_size, colour_of, converted, eight_bit, lightness, named, opacity, read

Span = tuple[float, float]

MAX_BLUR = 1000


def open_picture(source: Source, *, background: str = "white") -> Image.Image:
    """RGB, upright, opaque, 8 bit.

    source       a path; an encoded picture; an opened one (an animated one's current frame, which
                 is the first unless the caller moved it); or uint8 [H, W], [H, W, 3], [H, W, 4]
    background   what shows through transparent places: a colour name of Pillow's or #rrggbb
    raises       RequestError for what is not a picture, is truncated, holds more than MAX_PIXELS,
                 or for an unknown colour; StorageError for a file that cannot be read
    """
    colour = colour_of(background)
    image = eight_bit(read(source))
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, colour)
        image = Image.alpha_composite(behind, converted(image, "RGBA"))
    image = converted(image, "RGB")
    image.info = {}  # the EXIF among it would turn the picture again if it were opened twice
    return image


def pixels_of(image: Image.Image) -> Floats:
    """RGB -> float32 [3, H, W] in -1..1."""
    pixels = np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class Placed:
    """A picture on the canvas that the model runs at.

    pixels   float32 [3, H, W] in -1..1; H and W multiples of what the model wants
    image    the unpadded picture after resizing, RGB
    size     (height, width) of that
    rows, columns   the part of the source that it shows, in fractions: (0, 1) is all of it
    """

    pixels: Floats
    image: Image.Image
    size: tuple[int, int]
    rows: Span = (0.0, 1.0)
    columns: Span = (0.0, 1.0)

    def crop(self, made: Pixels) -> Pixels:
        """uint8 [H, W, 3] -> [h, w, 3] without the padding; [kH, kW, 3] -> [kh, kw, 3]."""
        height, width = self.pixels.shape[1:]
        scale = made.shape[0] // height
        assert made.shape[:2] == (scale * height, scale * width), (
            f"{made.shape} is no whole multiple of the canvas {height} x {width}"
        )
        return made[: scale * self.size[0], : scale * self.size[1]]

    def scaled(self, plane: Floats) -> Floats:
        """float32 [a, b], the source's own geometry at any size -> [h, w] (bilinear)."""
        image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        height, width = self.size
        left, right = (x * image.width for x in self.columns)
        top, bottom = (y * image.height for y in self.rows)
        box = (left, top, right, bottom)
        return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box), np.float32)

    def padded(self, plane: Floats) -> Floats:
        """float32 [h, w] -> [H, W]: edges repeated to the right and below, as the pixels are."""
        return _padded(plane, *self.pixels.shape[1:])


def place(
    image: Image.Image,
    *,
    width: int | None,
    height: int | None,
    resize: str,
    multiple: int,
    least: int,
) -> Placed:
    """An RGB picture at the asked size, on a canvas of whole multiples.

    width, height   pixels; None and None keep the picture's own; one alone keeps its proportions
    resize     stretch: exactly that size; fill: covers it, the rest cut off on both sides; fit: the
               largest size inside it with the picture's proportions (no bars)
    multiple, least   pixels: the canvas's sides are multiples, and at least that
    raises     UnknownName
    """
    if resize not in RESIZES:
        raise UnknownName("resize", resize, RESIZES)
    own, (h, w) = image.size, _asked(image, width, height)
    h, w, rows, columns = RESIZES[resize](own[1], own[0], h, w)
    box = (columns[0] * own[0], rows[0] * own[1], columns[1] * own[0], rows[1] * own[1])
    resized = image.resize((w, h), Image.Resampling.LANCZOS, box)
    canvas = padded_size(max(h, least), max(w, least), multiple)
    return Placed(_padded(pixels_of(resized), *canvas), resized, (h, w), rows, columns)


def _asked(image: Image.Image, width: int | None, height: int | None) -> tuple[int, int]:
    """(height, width), at least one pixel each."""
    if width is None and height is None:
        return image.height, image.width
    if width is None:
        assert height is not None
        return height, max(1, round(image.width * height / image.height))
    if height is None:
        return max(1, round(image.height * width / image.width)), width
    return height, width


_ALL: Span = (0.0, 1.0)
_Geometry = tuple[int, int, Span, Span]


def _stretch(h: int, w: int, height: int, width: int) -> _Geometry:
    return height, width, _ALL, _ALL


def _fill(h: int, w: int, height: int, width: int) -> _Geometry:
    scale = max(height / h, width / w)
    return height, width, _middle(height / scale / h), _middle(width / scale / w)


def _fit(h: int, w: int, height: int, width: int) -> _Geometry:
    scale = min(height / h, width / w)
    inside = (min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale))))
    return *inside, _ALL, _ALL


def _middle(part: float) -> Span:
    rest = max(0.0, (1 - part) / 2)
    return rest, 1 - rest


RESIZES: Mapping[str, Callable[[int, int, int, int], _Geometry]] = {
    "fit": _fit,
    "fill": _fill,
    "stretch": _stretch,
}


def _padded(values: Floats, height: int, width: int) -> Floats:
    """[..., h, w] -> [..., height, width]: the last row and column repeated."""
    h, w = values.shape[-2:]
    around = [(0, 0)] * (values.ndim - 2) + [(0, height - h), (0, width - w)]
    return np.pad(values, around, mode="edge")


def open_mask(
    source: Source,
    size: tuple[int, int],
    *,
    invert: bool = False,
    blur: float = 0.0,
    use_alpha: bool = False,
) -> Floats:
    """float32 [h, w] in 0..1: 1 (white) is repainted, 0 (black) is kept.

    The network repaints where the value is 0.5 or more: 127/255 keeps, 128/255 repaints. `blur`
    never moves a value over that line, so it softens the paste and leaves the network's mask alone,
    and no thin stroke is lost by it.

    size        (height, width) of the source picture, upright; a mask of another size is stretched
                to it, nearest pixel
    invert      white is kept instead
    blur        standard deviation of a Gaussian, 0 to MAX_BLUR pixels
    use_alpha   the mask is the picture's opacity; else its lightness (L of RGB, alpha ignored)
    raises      RequestError, StorageError as open_picture; RequestError for a blur out of range, or
                when there is no alpha
    """
    if not 0 <= blur <= MAX_BLUR:
        raise RequestError(
            f"the mask's blur is {blur}; it must be 0 to {MAX_BLUR} pixels",
            hint="give a blur of 0 for a hard edge, 4 to 16 for a soft one",
        )
    image = eight_bit(read(source))
    grey = opacity(image) if use_alpha else lightness(image)
    grey = grey.resize((size[1], size[0]), Image.Resampling.NEAREST)
    mask = np.asarray(grey, np.uint8)
    if invert:
        mask = 255 - mask
    if blur > 0:
        soft = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(blur))
        blurred = np.asarray(soft, np.uint8)
        mask = np.where(mask >= 128, np.maximum(blurred, 128), np.minimum(blurred, 127))
    return mask.astype(np.float32) / np.float32(255)


@dataclass(frozen=True, eq=False)
class PlacedMask:
    """A mask with the geometry of its picture.

    network   float32 [H, W], 0 or 1, on the canvas that the model runs at
    paste     float32 [h, w] in 0..1, for the unpadded picture
    """

    network: Floats
    paste: Floats


def place_mask(mask: Floats, placed: Placed, *, thin: str = "nearest") -> PlacedMask:
    """What `open_mask` gave, resized and cropped as `placed` was.

    The padding repeats the mask's edge, as the picture's padding repeats its edge: what was to be
    hidden from the network stays hidden there too, and what was kept borders on more of the same.

    thin     nearest: a pixel that was resized counts by its average; max: by the whitest pixel of
             the source that it covers, so that no stroke is lost when the picture shrinks
    raises   UnknownName
    """
    _check_thin(thin)
    soft = np.clip(placed.scaled(mask), 0, 1) if thin == "nearest" else _whitest(mask, placed)
    return PlacedMask(placed.padded((soft >= 0.5).astype(np.float32)), soft)


def _whitest(mask: Floats, placed: Placed) -> Floats:
    """[a, b] -> [h, w]: of all source pixels that a pixel covers, even in part, the largest."""
    rows = [mask[part].max(axis=0) for part in _covered(placed.rows, mask.shape[0], placed.size[0])]
    tall = np.stack(rows)
    columns = _covered(placed.columns, mask.shape[1], placed.size[1])
    return np.stack([tall[:, part].max(axis=1) for part in columns], axis=1)


def _covered(span: Span, source: int, count: int) -> list[slice]:
    edges = np.linspace(span[0] * source, span[1] * source, count + 1)
    slack = 1e-6  # of a pixel: an edge that falls between two pixels up to rounding touches one
    first = np.floor(edges[:-1] + slack).astype(int)
    last = np.ceil(edges[1:] - slack).astype(int)
    return [slice(a, b) for a, b in zip(first, last, strict=True)]


def latent_mask(mask: Floats, factor: int, *, thin: str) -> Floats:
    """float32 [H, W] of 0 and 1, in pixels -> [1, H / factor, W / factor].

    thin     nearest: each cell takes its first pixel, (factor i, factor j), as the reference does;
             a stroke thinner than a cell can vanish. max: a cell with one white pixel is white
    raises   UnknownName
    """
    _check_thin(thin)
    h, w = (side // factor for side in mask.shape)
    assert mask.shape == (h * factor, w * factor), f"mask {mask.shape} is no multiple of {factor}"
    cells = mask.reshape(h, factor, w, factor)
    return (cells[:, 0, :, 0] if thin == "nearest" else cells.max(axis=(1, 3)))[None].copy()


def _check_thin(thin: str) -> None:
    if thin not in ("nearest", "max"):
        raise UnknownName("way to keep thin strokes", thin, ("nearest", "max"))


def paste(original: Pixels, made: Pixels, mask: Floats) -> Pixels:
    """uint8 [h, w, 3]: `made` where the mask is 1, exactly `original` where it is 0."""
    assert original.shape == made.shape == (*mask.shape, 3), (
        f"{original.shape}, {made.shape} and mask {mask.shape} must be one size"
    )
    weight = mask[..., None]
    mixed = original + weight * (made.astype(np.float32) - original)
    return np.rint(mixed).astype(np.uint8)


def open_depth(source: Source) -> Floats:
    """float32 [h, w]: larger (whiter) is nearer, in the picture's own units.

    source   as open_picture, of 8 bit (its lightness), 16 bit or float; or an array [H, W] of
             numbers
    raises   RequestError for NaN or infinity in it, and as open_picture
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype.kind in "uif":
        check_size("the depth array", source.shape[1], source.shape[0])
        values: Array = source
    else:
        image = read(source)
        deep = image.mode == "F" or image.mode.startswith("I")
        values = np.asarray(image if deep else lightness(image))
    with np.errstate(over="ignore"):
        depth = values.astype(np.float32)
    bad = depth.size - int(np.count_nonzero(np.isfinite(depth)))
    if bad:
        raise RequestError(
            f"{named(source)} holds NaN or infinity in {bad} of {depth.size} depth values",
            hint="fill the holes of the depth map, for example with its smallest value (far away)",
        )
    return depth
