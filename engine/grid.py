"""All pictures of a command on one sheet, as the reference's scripts lay them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import images, metadata, watermark
from .errors import RequestError
from .pipeline import Result

GAP = 2  # black pixels around each picture: torchvision's make_grid, which the reference calls


def check_columns(columns: int | None) -> None:
    if columns is not None and columns < 1:
        raise RequestError(
            f"grid-columns is {columns}; it must be 1 or more",
            hint="give the number of pictures in a row, or leave it out",
        )


def sheet(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Row by row, first picture at the top left; a short last row is filled with black.

    pictures    at least one, RGB, all of one size
    columns     1 or more, at most as many as there are pictures; None: as square as can be
    """
    wanted = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    across = min(wanted, len(pictures))
    down = math.ceil(len(pictures) / across)
    width, height = pictures[0].size
    pitch = width + GAP, height + GAP
    made = Image.new("RGB", (across * pitch[0] + GAP, down * pitch[1] + GAP))
    for k, picture in enumerate(pictures):
        row, column = divmod(k, across)
        made.paste(picture, (column * pitch[0] + GAP, row * pitch[1] + GAP))
    return made


def save(path: Path, results: Sequence[Result], columns: int | None = None) -> Path:
    """One sheet of all pictures of these runs, at least one, written whole or not at all.

    It gets a mark of its own where it is large enough and its first picture was to have one: the
    pictures' marks are not found on it, since they no longer lie at multiples of four pixels. The
    sheet of one run holds the request that makes all of its pictures again.

    raises      StorageError, RequestError as images.save
    """
    pictures = [picture for result in results for picture in result.pictures]
    made = sheet([picture.image for picture in pictures], columns)
    if pictures[0].request.watermark and watermark.fits(made.height, made.width):
        made = Image.fromarray(watermark.encode(np.asarray(made)))
    if len(results) > 1:
        return images.save(made, path)
    request, first = results[0].request.to_dict(), pictures[0]
    return images.save(made, path, metadata.describe(request, first.about, first.image.size))
