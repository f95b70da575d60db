"""How far a picture is from its reference: three measures, in numpy alone, without downloads.

    psnr      decibels; every pixel alike
    ssim      structure in windows of 11 pixels; on luma, or the mean over red, green and blue
    gmsd      how unevenly edges are kept over the picture: local damage counts most

Pictures are arrays [H, W, 3] or [H, W]: uint8, or float in 0..1. What is compared has one size and
one type; nothing is scaled, cropped or clipped here.

checked by  tests/unit/test_bench_quality.py: scikit-image 0.26, piq 0.8, closed forms
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..engine.errors import RequestError

Floats = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601-7, 2.5.1
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03
GRADIENT_FLOOR = 170 / 255**2  # the constant of GMSD's paper, which is for pixels of 0..255


@dataclass(frozen=True)
class Quality:
    """One picture against its reference.

    psnr_db     peak signal to noise over all channels; None: the pictures are equal
    ssim        of luma, -1..1; 1: equal
    ssim_rgb    mean over the channels, -1..1
    gmsd        gradient magnitude similarity deviation, 0..0.5; 0: equal
    max_abs     largest difference of one value, of 255
    """

    psnr_db: float | None
    ssim: float
    ssim_rgb: float
    gmsd: float
    max_abs: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def compare(picture: ArrayLike, reference: ArrayLike) -> Quality:
    """All measures of one pair. Raises RequestError, as the single ones do."""
    a, b = _pair(picture, reference)
    ratio = _psnr(a, b)
    return Quality(
        psnr_db=None if math.isinf(ratio) else ratio,
        ssim=_ssim(_luma(a), _luma(b)),
        ssim_rgb=_ssim(a, b),
        gmsd=_gmsd(_luma(a), _luma(b)),
        max_abs=float(np.abs(a - b).max()) * 255,
    )


def psnr(picture: ArrayLike, reference: ArrayLike) -> float:
    """10 log10(1 / mean squared difference), in decibels; infinite for equal pictures.

    raises      RequestError: sizes or types differ, or a value is not of a picture
    """
    return _psnr(*_pair(picture, reference))


def ssim(picture: ArrayLike, reference: ArrayLike, *, luma: bool = True) -> float:
    """Mean structural similarity, -1..1.

    luma        of the brightness alone, as the paper does; else the mean over the channels
    source      Wang, Bovik, Sheikh, Simoncelli 2004, doi:10.1109/TIP.2003.819861, equation 13 and
                section III-C: Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, windows that lie
                wholly inside
    raises      RequestError, also for a side under 11 pixels
    """
    a, b = _pair(picture, reference)
    return _ssim(_luma(a), _luma(b)) if luma else _ssim(a, b)


def gmsd(picture: ArrayLike, reference: ArrayLike) -> float:
    """Deviation of the similarity of gradients over the picture: 0 equal, larger is worse.

    source      Xue, Zhang, Mou, Bovik 2014, arXiv:1308.3052, equations 1 to 5: luma averaged over
                2x2 pixels, Prewitt gradients, c 170
    raises      RequestError, also for a side under 11 pixels
    """
    a, b = _pair(picture, reference)
    return _gmsd(_luma(a), _luma(b))


def _psnr(a: Floats, b: Floats) -> float:
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def _ssim(a: Floats, b: Floats) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    # the two variances are only ever used as their sum
    spread = _blur(a * a + b * b) - mean_a**2 - mean_b**2
    shared = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float(np.mean(likeness / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))))


def _blur(values: Floats) -> Floats:
    """[H, W, C] -> [H-10, W-10, C]: Gaussian means over windows that lie wholly inside."""
    at = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(at**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    height, width = values.shape[0] - WINDOW + 1, values.shape[1] - WINDOW + 1
    rows = sum(k * values[i : i + height] for i, k in enumerate(kernel))
    return np.asarray(sum(k * rows[:, i : i + width] for i, k in enumerate(kernel)))


def _gmsd(a: Floats, b: Floats) -> float:
    edges_a, edges_b = _gradient(_halved(a[..., 0])), _gradient(_halved(b[..., 0]))
    floor = GRADIENT_FLOOR
    alike = (2 * edges_a * edges_b + floor) / (edges_a**2 + edges_b**2 + floor)
    return float(np.std(alike))


def _halved(values: Floats) -> Floats:
    """Means of 2x2 pixels; an odd last row or column is averaged with black, as theirs is."""
    even = np.pad(values, [(0, side % 2) for side in values.shape])
    blocks = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _gradient(values: Floats) -> Floats:
    """Size of the Prewitt gradient, one third of the difference of two rows or columns of three;
    outside of the picture is black, as in the paper's own program."""
    v = np.pad(values, 1)
    across = (v[:-2] + v[1:-1] + v[2:]) / 3
    down = (v[:, :-2] + v[:, 1:-1] + v[:, 2:]) / 3
    return np.hypot(across[:, 2:] - across[:, :-2], down[2:] - down[:-2])


def _luma(values: Floats) -> Floats:
    """[H, W, C] -> [H, W, 1]"""
    return values if values.shape[2] == 1 else (values @ LUMA)[..., None]


def _pair(picture: ArrayLike, reference: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64 [H, W, 1 or 3] in 0..1."""
    a, b = np.asarray(picture), np.asarray(reference)
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        raise RequestError(
            f"a picture {a.dtype}{list(a.shape)} cannot be compared with a reference "
            f"{b.dtype}{list(b.shape)}",
            hint="make both with the same size and type: the measures neither scale nor convert",
        )
    return _unit(a), _unit(b)


def _unit(values: NDArray[Any]) -> Floats:
    colours = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or colours not in (1, 3) or min(values.shape[:2]) < WINDOW:
        raise RequestError(
            f"an array {list(values.shape)} is no picture that can be compared",
            hint=f"give [H, W, 3] or [H, W], each side {WINDOW} or more: the windows' size",
        )
    unit = values.astype(np.float64).reshape(*values.shape[:2], colours)
    if values.dtype == np.uint8:
        return unit / 255
    if values.dtype.kind != "f" or not (unit.min() >= 0 and unit.max() <= 1):
        raise RequestError(
            f"pixels are {values.dtype} from {unit.min():g} to {unit.max():g}",
            hint="give uint8, or float in 0..1: (x + 1) / 2 for the decoder's -1..1",
        )
    return unit
