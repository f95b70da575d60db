"""What each channel of a layer's input is divided by before it is rounded to 8 bits.

One scale serves all channels of an activation, so that the largest channel makes the noise of all.
Dividing channels by numbers of their own, and multiplying the weight by them, is exact in float and
moves the noise into the weight, which has a scale for each output. How far, and where the grid
ends, is chosen by the noise that both make in the layer's output.

source      Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, equation 4; the choice by output error:
            Lin et al. 2023, AWQ, arXiv:2306.00978, section 3.2
checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..engine.ports import Floats
from .graph.quantize import INT8, Grid, Steps, rounded_weight
from .observe import CUT, Seen, grid, rounding_error

STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # 0: nothing is divided
ROWS = 192  # outputs of a weight that its rounding noise is measured on
RANGE = 1e4  # the largest divisor over the smallest
SPAN = 8.0  # a channel counts as an eighth of the loudest at least: other prompts wake quiet ones


@dataclass(frozen=True)
class Fit:
    """divisors: [C], None where nothing is divided; grid: of the divided input; noise: mean squared
    error of the output over the output's mean square."""

    divisors: Floats | None
    grid: Grid
    noise: float


def fit(
    seen: Seen,
    weights: Sequence[Floats],
    *,
    symmetric: bool,
    shares: Sequence[float] = CUT,
    steps: Steps = INT8,
) -> Fit:
    """The best fit for one activation.

    seen        of the activation
    weights     of all layers that take it: [O, C, ...]
    symmetric, shares   see `grid`
    steps       of a floating point are as fine for a small channel: nothing is divided
    """
    few = [w[:: 1 + len(w) // ROWS].reshape(-1, w.shape[1], *w.shape[2:]) for w in weights]
    power = np.mean(seen.values.astype(np.float64) ** 2, axis=0)
    signal = sum(float(power @ _squares(w)) for w in few)
    choices = _choices(seen, few) if steps is INT8 else [None]
    grid_of = partial(grid, symmetric=symmetric, shares=shares, steps=steps)
    found = [_tried(seen, few, by, power, signal, grid_of) for by in choices]
    return min(found, key=lambda f: f.noise)


def _choices(seen: Seen, weights: Sequence[Floats]) -> list[Floats | None]:
    inputs = np.maximum(np.abs(seen.lows), np.abs(seen.highs)).astype(np.float64)
    outputs = np.max([np.abs(_by_channel(w)).max(axis=1) for w in weights], axis=0)
    if min(inputs.max(), outputs.max()) == 0:
        return [None]
    inputs = np.maximum(inputs, inputs.max() / SPAN)
    outputs = np.maximum(outputs, outputs.max() / RANGE)
    result: list[Floats | None] = [None]
    for strength in STRENGTHS[1:]:
        by = inputs**strength / outputs ** (1 - strength)
        by /= np.exp(np.mean(np.log(by)))
        middle = np.sqrt(RANGE)
        result.append(np.clip(by, 1 / middle, middle).astype(np.float32))
    return result


def _tried(
    seen: Seen,
    weights: Sequence[Floats],
    by: Floats | None,
    power: Floats,
    signal: float,
    grid_of: Callable[..., Grid],
) -> Fit:
    """power: [C], mean square of each channel; signal: mean square of the output, times outputs"""
    if by is not None:
        seen = seen.divided(by)
        power = power / by.astype(np.float64) ** 2
        weights = [w * by.reshape(-1, *[1] * (w.ndim - 2)) for w in weights]
    counts: Floats = np.sum([_squares(w) for w in weights], axis=0)
    chosen = grid_of(seen, weights=counts)
    error = np.mean(rounding_error(seen.values, chosen).astype(np.float64) ** 2, axis=0)
    noise = float(error @ counts)
    for weight in weights:
        rounded, scale = rounded_weight(weight, chosen.steps)
        wide = rounded.astype(np.float32)
        lost = wide * scale.reshape(-1, *[1] * (weight.ndim - 1)) - weight
        noise += float(power @ _squares(lost))
    return Fit(by, chosen, noise / max(signal, 1e-300))


def _by_channel(weight: Floats) -> Floats:
    """[O, C, ...] -> [C, ...]"""
    result: Floats = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)
    return result


def _squares(weight: Floats) -> Floats:
    """Sum of squares over all but the channels, [C]."""
    values = _by_channel(weight).astype(np.float64)
    return np.asarray(np.einsum("ck,ck->c", values, values))
