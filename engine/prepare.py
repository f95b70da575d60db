"""Pictures as the depth network and the image towers were trained to see them, and depth as a UNet
takes it. Three resizes of other libraries, each written as one small matrix for each axis.

checked by  tests/golden/test_pictures.py (the reference's arrays), tests/unit/test_prepare.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import NumericsError
from .ports import Array, Floats

Doubles = NDArray[np.float64]

DEPTH_SIDE, DEPTH_MULTIPLE = (
    384,
    32,
)  # MiDaS DPT: what one side should come near to; both sides' grid
A = -0.75  # the cubic kernel's parameter in OpenCV and torch; Pillow has -0.5

# A depth map whose values differ by less than this part of the largest says nothing: float32 has
# seven digits, and stretched to -1..1 it would be noise. Every other map is left as it is.
FLAT = 1e-6


def for_depth(pixels: Floats) -> Floats:
    """float32 [3, H, W] in -1..1 -> float32 [1, 3, h, w] in about -1..1, sides multiples of 32.

    The proportions are kept but for rounding: of 384 / H and 384 / W the scale nearer to 1 counts
    for both sides. Cubic, not smoothed when it shrinks (cv2.INTER_CUBIC).

    source   MiDaS (Ranftl et al.), `dpt_hybrid`'s transform: reference-spec 1.10
    """
    height, width = depth_size(*pixels.shape[1:])
    unit = (pixels + np.float32(1)) / np.float32(2)
    rows = _cubic(pixels.shape[1], _centres(pixels.shape[1], height))
    columns = _cubic(pixels.shape[2], _centres(pixels.shape[2], width))
    return (_resampled(unit, rows, columns) * np.float32(2) - np.float32(1))[None]


def depth_size(height: int, width: int) -> tuple[int, int]:
    """What the depth network is run at; a side that would round to 0 becomes one multiple."""
    scale = min((DEPTH_SIDE / height, DEPTH_SIDE / width), key=lambda s: abs(1 - s))
    # numpy's round and Python's both take a half to the even neighbour, as MiDaS does
    tall, wide = (round(scale * side / DEPTH_MULTIPLE) for side in (height, width))
    return max(tall, 1) * DEPTH_MULTIPLE, max(wide, 1) * DEPTH_MULTIPLE


def depth_condition(depth: Array, latent: tuple[int, int]) -> Floats:
    """[h', w'] at any size -> float32 [1, h, w], the smallest value -1, the largest 1.

    Bicubic as torch does it (align_corners=False, not smoothed). A flat map becomes 0 everywhere;
    the reference divides 0 by 0 there.

    raises   NumericsError for NaN or infinity
    """
    bad = depth.size - int(np.count_nonzero(np.isfinite(depth)))
    if bad:
        raise NumericsError(
            f"the depth map holds NaN or infinity in {bad} of {depth.size} values",
            hint="run the depth network in float32, or give a depth picture of your own",
        )
    rows = _cubic(depth.shape[0], _centres(depth.shape[0], latent[0]))
    columns = _cubic(depth.shape[1], _centres(depth.shape[1], latent[1]))
    small = rows @ depth.astype(np.float64) @ columns.T
    low, high = small.min(), small.max()
    if high - low <= FLAT * max(abs(low), abs(high)):
        return np.zeros((1, *latent), np.float32)
    stretched: Doubles = 2 * (small - low) / (high - low) - 1
    return stretched.astype(np.float32)[None]


def for_image_encoder(
    pixels: Floats, size: int, mean: Sequence[float], std: Sequence[float]
) -> Floats:
    """float32 [3, H, W] in -1..1 -> float32 [1, 3, size, size], normalised.

    Squashed to a square, nothing cropped: bicubic with align_corners=True. When a side shrinks,
    both are blurred first; so did the version of kornia that the models were trained with (0.6.0).
    Later versions blur less, and others crop to a square: their embeddings differ.

    mean, std   three each, for values in 0..1
    source      reference-spec 1.9; kornia 0.6.0, geometry.transform.resize
    """
    sides = pixels.shape[1:]
    shrinks = max(sides) > size
    rows, columns = (_blurred_cubic(side, size) if shrinks else _cubic(side, _corners(side, size))
                     for side in sides)  # fmt: skip
    unit = (_resampled(pixels, rows, columns) + np.float32(1)) / np.float32(2)
    centre, scale = (np.array(v, np.float32).reshape(3, 1, 1) for v in (mean, std))
    return ((unit - centre) / scale)[None]


def _resampled(pixels: Floats, rows: Doubles, columns: Doubles) -> Floats:
    """[3, H, W] -> [3, h, w] by rows [h, H] and columns [w, W]."""
    down: Floats = np.matmul(rows.astype(np.float32), pixels)
    across: Floats = np.matmul(down, columns.astype(np.float32).T)
    return across


def _centres(source: int, count: int) -> Doubles:
    """Where `count` pixels' middles lie among `source` pixels."""
    return (np.arange(count, dtype=np.float64) + 0.5) * (source / count) - 0.5


def _corners(source: int, count: int) -> Doubles:
    """The same with the first on the first and the last on the last."""
    return np.arange(count, dtype=np.float64) * ((source - 1) / max(count - 1, 1))


def _cubic(source: int, places: Doubles) -> Doubles:
    """[len(places), source]: cubic interpolation at each place; the edge pixels go on for ever."""
    index, weight = _taps(places)
    return _matrix(source, np.clip(index, 0, source - 1), weight)


def _blurred_cubic(source: int, count: int) -> Doubles:
    """[count, source]: a Gaussian blur with mirrored borders, then cubic interpolation."""
    sigma = max(source / count, 1.0)
    taps = int(4 * sigma) // 2 * 2 + 1  # made odd
    offset = np.arange(taps) - taps // 2
    kernel = np.exp(-(offset**2) / (2 * sigma**2))
    index, weight = _taps(_corners(source, count))
    index = np.clip(index, 0, source - 1)[:, :, None] + offset
    both = weight[:, :, None] * (kernel / kernel.sum())
    period = max(2 * (source - 1), 1)
    folded = np.minimum(index % period, -index % period)  # 0 1 2 1 0 1 2 ...: the edge stands once
    return _matrix(source, folded.reshape(count, -1), both.reshape(count, -1))


def _taps(places: Doubles) -> tuple[NDArray[np.intp], Doubles]:
    """Four neighbours of each place and their weights, [n, 4] each."""
    first = np.floor(places).astype(np.intp)
    t = places - first
    outer = [((A * d - 5 * A) * d + 8 * A) * d - 4 * A for d in (t + 1, 2 - t)]
    inner = [((A + 2) * d - (A + 3)) * d * d + 1 for d in (t, 1 - t)]
    weight = np.stack([outer[0], inner[0], inner[1], outer[1]], axis=1)
    return first[:, None] + np.arange(-1, 3), weight


def _matrix(source: int, index: NDArray[np.intp], weight: Doubles) -> Doubles:
    matrix = np.zeros((len(index), source))
    np.add.at(matrix, (np.arange(len(index))[:, None], index), weight)
    return matrix
