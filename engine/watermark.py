"""The invisible mark of the original scripts: the letters SDV2 in the colours of a picture.

The method is `dwtDct` of the package invisible-watermark (0.1 to 0.2), reference-spec 4. One colour
plane (U of YUV) is taken apart by a Haar wavelet. Each 4 x 4 block of its coarse half carries one
of 32 bits, in turn: the largest value of the block, its first excepted, is moved to one quarter or
three quarters of a step of 36. Two of the original's quirks are part of the mark and are kept: the
inverse wavelet exchanges two details, which transposes each 2 x 2 pixels of U, and the result is
cut down to whole numbers, not rounded, so that the order of float64 operations shows in the pixels.

The mark costs bits: smooth or saturated pictures give back 25 to 31 of the 32, in the original too.

checked by  tests/golden/test_pictures.py (pixels of the original), tests/unit/test_watermark.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .images import Pixels

Ints = NDArray[np.int32]
Doubles = NDArray[np.float64]

TEXT = "SDV2"
BITS: NDArray[np.uint8] = np.unpackbits(np.frombuffer(TEXT.encode(), np.uint8))  # high bit first
ENOUGH = 26  # bits that must agree to call it the mark; 32 coins do so once in 3,700 throws
MIN_AREA = 256 * 256  # pixels; the original refuses less
STEP = 36.0  # between two values of the same bit
BLOCK = 4  # coarse values on a side
STRIPE = 2**15  # pixels that are marked at a time, so that the planes stay in the cache
HALF = 2**-0.5  # the Haar wavelet's only coefficient

# 8-bit YUV as video has it, in 14-bit fixed point as OpenCV does it.
SHIFT, ROUND, CENTRE = 14, 1 << 13, 128
Y_R, Y_G, Y_B = 4899, 9617, 1868
U_B, V_R = 8061, 14369
B_U, G_U, G_V, R_V = 33292, -6472, -9519, 18678


def fits(height: int, width: int) -> bool:
    """Whether a picture of that many pixels is large enough for the mark."""
    return height * width >= MIN_AREA and min(height, width) >= 2 * BLOCK


def encode(pixels: Pixels) -> Pixels:
    """uint8 [H, W, 3] RGB -> the same with the mark in it.

    raises   RequestError when the picture does not fit (ask `fits` before)
    """
    height, width = pixels.shape[:2]
    if not fits(height, width):
        raise RequestError(
            f"a picture of {width} x {height} pixels is too small for the invisible mark,"
            f" which needs {MIN_AREA} pixels and sides of {2 * BLOCK}",
            hint="make a larger picture, or leave the mark out (`--no-watermark`)",
        )
    marked = np.empty_like(pixels)
    first = 0
    for rows in _stripes(height, width):
        y, u, v = _yuv(pixels[rows])
        inner = _inner(u)
        bands = _haar(inner)
        first += _write_bits(bands.coarse, first)
        inner[:] = bands.inverse()
        _write_rgb(marked[rows], y, u, v)
    return marked


def decode(pixels: Pixels) -> tuple[list[int], str | None]:
    """uint8 [H, W, 3] RGB -> the 32 bits as the original's decoder reads them, and TEXT or None.

    None when fewer than ENOUGH bits are the mark's. Bits that no block carries (there is one block
    in 8 x 8 pixels) read 0.
    """
    stripes = (_inner(_yuv(pixels[rows])[1]) for rows in _stripes(*pixels.shape[:2]))
    blocks = np.concatenate([_blocks(_haar(u).coarse) for u in stripes])
    values = np.take_along_axis(blocks, _largest(blocks), axis=1)[:, 0]
    ones = np.abs(values) % STEP > STEP / 2
    which = np.arange(len(ones)) % len(BITS)
    count = np.bincount(which, minlength=len(BITS))
    mean = np.bincount(which, ones, minlength=len(BITS)) / np.maximum(count, 1)
    read = [int(bit) for bit in mean * 255 > 127]
    return read, TEXT if agreeing(read) >= ENOUGH else None


def agreeing(bits: list[int]) -> int:
    """How many of 32 bits are the mark's own; 16 is chance."""
    return int((np.array(bits) == BITS).sum())


def _stripes(height: int, width: int) -> list[slice]:
    """Rows that are worked on at a time: whole blocks."""
    rows = max(STRIPE // width // (2 * BLOCK), 1) * 2 * BLOCK
    return [slice(top, top + rows) for top in range(0, height, rows)]


def _inner(plane: Ints) -> Ints:
    """What the wavelet takes: sides cut to multiples of 4."""
    return plane[: plane.shape[0] // 4 * 4, : plane.shape[1] // 4 * 4]


@dataclass
class _Bands:
    """A plane's Haar wavelet: float64 [h/2, w/2] each; `rows` is the detail between rows."""

    coarse: Doubles
    rows: Doubles
    columns: Doubles
    both: Doubles

    def inverse(self) -> Ints:
        """With rows and columns exchanged, and cut down to whole numbers: see the top."""
        h, w = self.coarse.shape
        low, high = np.empty((h, 2 * w)), np.empty((h, 2 * w))
        for out, a, b in ((low, self.coarse, self.rows), (high, self.columns, self.both)):
            a, b = HALF * a, HALF * b
            np.add(a, b, out=out[:, 0::2])
            np.subtract(a, b, out=out[:, 1::2])
        low *= HALF
        high *= HALF
        plane = np.empty((2 * h, 2 * w), np.int32)
        plane[0::2] = low + high
        plane[1::2] = low - high
        return plane


def _haar(plane: Ints) -> _Bands:
    """[h, w], both even."""
    scaled = HALF * plane
    low, high = scaled[0::2] + scaled[1::2], scaled[0::2] - scaled[1::2]
    low *= HALF
    high *= HALF
    return _Bands(
        coarse=low[:, 0::2] + low[:, 1::2],
        rows=high[:, 0::2] + high[:, 1::2],
        columns=low[:, 0::2] - low[:, 1::2],
        both=high[:, 0::2] - high[:, 1::2],
    )


def _blocks(coarse: Doubles) -> Doubles:
    """[h, w] -> a copy [blocks, 16] in the order of rows; what is over at the edges is left out."""
    h, w = (side // BLOCK for side in coarse.shape)
    whole = coarse[: h * BLOCK, : w * BLOCK].reshape(h, BLOCK, w, BLOCK)
    return whole.transpose(0, 2, 1, 3).reshape(h * w, BLOCK * BLOCK)


def _largest(blocks: Doubles) -> NDArray[np.intp]:
    """[blocks, 1]: where in each block the largest value lies; the first place does not count."""
    place: NDArray[np.intp] = np.argmax(np.abs(blocks[:, 1:]), axis=1, keepdims=True)
    return place + 1


def _write_bits(coarse: Doubles, first: int) -> int:
    """In place; how many blocks there are. `first` came before. Sums of U are never negative."""
    blocks = _blocks(coarse)
    number = np.arange(len(blocks))
    place = _largest(blocks)
    value = np.take_along_axis(blocks, place, axis=1)[:, 0]
    value = (value // STEP + 0.25 + 0.5 * BITS[(first + number) % len(BITS)]) * STEP
    block_row, block_column = np.divmod(number, coarse.shape[1] // BLOCK)
    row, column = np.divmod(place[:, 0], BLOCK)
    coarse[block_row * BLOCK + row, block_column * BLOCK + column] = value
    return len(blocks)


def _yuv(pixels: Pixels) -> tuple[Ints, Ints, Ints]:
    """uint8 [H, W, 3] RGB -> three planes [H, W] of 0..255."""
    r, g, b = (pixels[..., k].astype(np.int32) for k in range(3))
    y = (Y_R * r + Y_G * g + Y_B * b + ROUND) >> SHIFT
    u = (U_B * (b - y) + ((CENTRE << SHIFT) + ROUND)) >> SHIFT
    v = (V_R * (r - y) + ((CENTRE << SHIFT) + ROUND)) >> SHIFT
    return y, u, np.clip(v, 0, 255, out=v)  # U stays within 17..239 by itself


def _write_rgb(out: Pixels, y: Ints, u: Ints, v: Ints) -> None:
    u, v = u - CENTRE, v - CENTRE
    for channel, change in enumerate((R_V * v, G_U * u + G_V * v, B_U * u)):
        change += ROUND
        change >>= SHIFT
        change += y
        out[..., channel] = np.clip(change, 0, 255, out=change)
