"""All pictures of a folder on one sheet, however many and however large.

checked by  tests/serve/test_batch.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..engine import grid, images

CELL = 256  # pixels: the longest side of a picture on a sheet
LARGEST = 2**26  # pixels of a sheet: a reader refuses what is much larger


def sheet(paths: Sequence[Path], place: Path, columns: int | None = None) -> Path:
    """Row by row, in this order; each picture made smaller where it is larger than its cell.

    paths       at least one
    raises      StorageError, RequestError as images.save
    """
    side = min(CELL, math.isqrt(LARGEST // len(paths)) - grid.GAP)
    cells = [_thumbnail(path, side) for path in paths]
    width = max(cell.width for cell in cells)
    height = max(cell.height for cell in cells)
    return images.save(grid.sheet([_centred(c, width, height) for c in cells], columns), place)


def _thumbnail(path: Path, side: int) -> Image.Image:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _centred(picture: Image.Image, width: int, height: int) -> Image.Image:
    if picture.size == (width, height):
        return picture
    cell = Image.new("RGB", (width, height))
    cell.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return cell
