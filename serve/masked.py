"""Inpainting as AUTOMATIC1111's clients ask for it: what lies under the mask filled from around it,
and the masked part alone made at the full size.

It runs in the worker: pictures are unpacked here.

checked by  tests/http/test_masked.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ..engine.errors import RequestError
from ..engine.inputs import open_mask, open_picture
from ..engine.request import Request

Box = tuple[int, int, int, int]  # left, top, right, bottom
Pixels = NDArray[np.uint8]
PutBack = Callable[[Image.Image, dict[str, str]], tuple[Image.Image, dict[str, str]]]

RADII = (2, 8, 32, 128, 512)  # in which colours are looked for, the nearest first
ENOUGH = 0.1  # weight of known pixels around, below which a colour is no more than rounding


def unchanged(image: Image.Image, about: dict[str, str]) -> tuple[Image.Image, dict[str, str]]:
    return image, about


def masked(
    request: Request, given: Mapping[str, Any], how: Mapping[str, Any]
) -> tuple[Request, dict[str, Any], PutBack]:
    """The request and the pictures to run in their place, and what to do with the result.

    how     `fill` and `region`, as asks.Pictures.about writes them
    raises  RequestError for pictures that cannot be read, and a mask that covers nothing
    """
    if len(given.get("image", ())) != 1 or "mask" not in given:
        raise RequestError("a mask needs one picture", hint="send one of init_images")
    original = open_picture(given["image"][0], background=request.background)
    size = (original.height, original.width)
    covered = open_mask(given["mask"], size, invert=request.invert_mask) >= 0.5
    mask: Pixels = np.where(covered, np.uint8(255), np.uint8(0))
    source = original if how["fill"] == "none" else filled(original, covered)
    request = replace(request, invert_mask=False)
    if how["region"] is None:
        return request, {**given, "image": [source], "mask": mask}, unchanged
    width = original.width if request.width is None else request.width
    height = original.height if request.height is None else request.height
    box = region(covered, how["region"]["padding"], width / height)
    left, top, right, bottom = box
    soft = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(how["region"]["blur"]))

    def put_back(made: Image.Image, about: dict[str, str]) -> tuple[Image.Image, dict[str, str]]:
        part = made.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = original.copy()
        whole.paste(part, (left, top), soft.crop(box))
        note = {"region": f"{left},{top},{right},{bottom}", "watermark": "off: a part was made"}
        return whole, {**about, **note}

    part = {**given, "image": [source.crop(box)], "mask": mask[top:bottom, left:right]}
    run = replace(request, width=width, height=height, resize="stretch")
    return run, part, put_back


def region(covered: NDArray[np.bool_], padding: int, aspect: float) -> Box:
    """The box around the mask, padded, and widened to width / height where there is room.

    raises  RequestError when the mask covers nothing
    """
    height, width = covered.shape
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if not len(rows):
        raise RequestError("the mask covers nothing", hint="paint white what is to be made anew")
    top, bottom = _span(int(rows[0]) - padding, int(rows[-1]) + 1 + padding, height)
    left, right = _span(int(columns[0]) - padding, int(columns[-1]) + 1 + padding, width)
    if (right - left) / (bottom - top) < aspect:
        left, right = _widened(left, right, round((bottom - top) * aspect), width)
    else:
        top, bottom = _widened(top, bottom, round((right - left) / aspect), height)
    return left, top, right, bottom


def _span(first: int, last: int, end: int) -> tuple[int, int]:
    return max(first, 0), min(last, end)


def _widened(first: int, last: int, length: int, end: int) -> tuple[int, int]:
    """To `length` around its middle, moved inside 0..end; all of it where that is shorter."""
    length = min(max(length, last - first), end)
    first = min(max((first + last - length) // 2, 0), end - length)
    return first, first + length


def filled(image: Image.Image, covered: NDArray[np.bool_]) -> Image.Image:
    """Where `covered` is true, the mean of the colours around; where none are near, of all."""
    pixels = np.asarray(image, np.uint8)
    known = ~covered
    if not known.any() or not covered.any():
        return image
    out = pixels.copy()
    out[covered] = pixels[known].mean(axis=0).astype(np.uint8)
    kept = Image.fromarray(np.where(known[..., None], pixels, 0).astype(np.uint8))
    weight = Image.fromarray(np.where(known, 255, 0).astype(np.uint8))
    open_places = covered.copy()
    for radius in RADII:
        blur = ImageFilter.GaussianBlur(radius)
        share = np.asarray(weight.filter(blur), np.float32) / 255
        place = open_places & (share >= ENOUGH)
        colours = np.asarray(kept.filter(blur), np.float32)[place] / share[place][:, None]
        out[place] = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
        open_places &= ~place
        if not open_places.any():
            break
    return Image.fromarray(out)
