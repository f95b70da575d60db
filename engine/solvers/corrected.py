"""Samplers with a corrector: what a row has answered improves the x that it was asked at.

The corrected x is never stored. A step's predictor P and corrector C start from the same x and add
the same noise, so the corrected x is  z + C(m of this row and before) - P(m before): the next row
takes it so, and the corrector costs nothing but two or three more weights.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..levels import Doubles, Schedule
from ..table import Prediction, Table
from .adams import integrate
from .rows import Rows, Weights, orders

Variant = Literal["bh1", "bh2"]


def unipc(
    schedule: Schedule, prediction: Prediction, order: int = 2, variant: Variant = "bh2"
) -> Table:
    """UniPC in x0; the corrector makes it of order + 1. B(h) is h for bh1, 1 - e^-h for bh2.

    The order falls to 1 at the end of a run that lands on sigma = 0 or has fewer than 15 rows.
    source      Zhao et al. 2023, arXiv:2302.04867, algorithms 7 and 8
    """
    rows, (r, logs) = Rows(schedule, "data"), _levels(schedule)
    predicted, corrected = dict[int, float](), dict[int, float]()
    short = len(schedule) + 1 if schedule.sigmas[-1] == 0.0 else 15
    for i, own in enumerate(orders(schedule, order, short)):
        keep, h = r[i + 1] / r[i], logs[i + 1] - logs[i]
        past = [(logs[i - k] - logs[i]) / h for k in range(1, own)]
        after = _from_newest(h, past, variant)
        rows.at(i, x={0: keep}, m=_corrected(keep, after, predicted, corrected))
        predicted, corrected = after, {}
        if r[i + 1] > 0.0:
            newest, at_end, *older = _from_newest(h, [1.0, *past], variant).values()
            corrected = dict(enumerate([at_end, newest, *older]))
    return rows.table(prediction)


def _from_newest(h: float, points: list[float], variant: Variant) -> dict[int, float]:
    """Weights of x0 at the start of a step of h in log SNR, then at `points`, in units of h.

    They integrate the polynomial through all of these exactly; with one point alone, B(h) / 2
    stands for the integral.
    """
    step = -math.expm1(-h)
    if not points:
        return {0: step}
    if len(points) == 1:
        slopes = np.array([0.5 * (h if variant == "bh1" else step)])
    else:
        moments = [_moment(h, k) for k in range(1, len(points) + 1)]
        powers = np.vander(points, increasing=True).T
        slopes = np.linalg.solve(powers, moments)
    shares = slopes / points
    return dict(enumerate([step - float(shares.sum()), *map(float, shares)]))


def _moment(h: float, k: int) -> float:
    """Integral over a step of e^(u - h) (u / h)^k du, u from 0 to h."""
    return integrate([0.0], 0.0, h, lambda u: np.exp(u - h) * (u / h) ** k)[0]


def sa_solver(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """SA-Solver, predictor and corrector of order 2; eta is its tau.

    As its authors' settings have it, noise is added between 0.2 and 0.8 of the training time only.
    source      Xue et al. 2023, arXiv:2309.05019, algorithm 1, with the authors' form of order 2
    """
    rows, (r, logs) = Rows(schedule, "data"), _levels(schedule)
    predicted, corrected = dict[int, float](), dict[int, float]()
    for i, own in enumerate(orders(schedule, 2, short=len(schedule) + 1)):
        tau = eta if _noisy(schedule, float(schedule.timesteps[i])) else 0.0
        g, h = 1.0 + tau**2, logs[i + 1] - logs[i]
        keep = (r[i + 1] / r[i]) ** g
        noise = r[i + 1] * math.sqrt(1.0 - (r[i + 1] / r[i]) ** (2.0 * tau**2))
        past = [logs[i - k] - logs[i] for k in range(own)]
        after = {0: 1.0} if r[i + 1] == 0.0 else _stochastic(h, g, past)
        rows.at(i, x={0: keep}, m=_corrected(keep, after, predicted, corrected), noise=noise)
        predicted, corrected = after, {}
        if r[i + 1] > 0.0:
            corrected = _stochastic(h, g, [h, 0.0])
    return rows.table(prediction)


def _stochastic(h: float, g: float, nodes: list[float]) -> dict[int, float]:
    """Weights of x0 at `nodes` (log SNR from the start of a step of h), newest first."""

    def density(u: Doubles) -> Doubles:
        return g * np.exp(g * (u - h))

    weights = integrate(nodes, 0.0, h, density)
    if len(nodes) == 2:
        # O(h^3): the slope's integral taken as h^2 / 2, which the authors found better
        more = g * (h**2 / 2 - (g * h + math.expm1(-g * h)) / g**2) / (nodes[0] - nodes[1])
        weights = [weights[0] + more, weights[1] - more]
    return dict(enumerate(weights))


def _noisy(schedule: Schedule, time: float) -> bool:
    if schedule.training is None:
        return True
    return 0.2 <= time / schedule.training.timesteps <= 0.8


def _corrected(
    keep: float, after: Weights, predicted: Weights, corrected: Weights
) -> dict[int, float]:
    """A step's own weights, from the x that the corrector would have made of the last step's."""
    m = dict(after)
    for k, weight in corrected.items():
        m[k] = m.get(k, 0.0) + keep * weight
    for k, weight in predicted.items():
        m[k + 1] = m.get(k + 1, 0.0) - keep * weight
    return m


def _levels(schedule: Schedule) -> tuple[list[float], list[float]]:
    """sigma / alpha, and log(alpha / sigma) with infinity for the level 0."""
    r = schedule.ratios.tolist()
    return r, [-math.log(ratio) if ratio > 0.0 else math.inf for ratio in r]
