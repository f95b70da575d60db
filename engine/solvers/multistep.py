"""DPM-Solver++ with history, one network call a step; and its stochastic forms."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..levels import Schedule
from ..table import Prediction, Table
from .rows import Rows, Weights, orders


def _multistep(
    schedule: Schedule,
    prediction: Prediction,
    eta: float,
    *,
    order: int,
    second: Literal["midpoint", "heun"],
    lower_end: bool,
) -> Table:
    """DPM-Solver++ of order 1 to 3 in x0, with eta of the noise of the reversed process.

    With g = (1 + eta) h the exact integrals of 1, u, u^2 / 2 are p1 = 1 - e^-g, p2 = 1 - p1 / g and
    p3 = p2 / g - 1/2. Second order by "heun" takes p2, by "midpoint" p1 / 2.
    source      Lu et al. 2022, arXiv:2211.01095, algorithm 2, eq. 18; third order and the SDE
                as in diffusers and k-diffusion
    """
    rows, r = Rows(schedule, "data"), schedule.ratios
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(r))
    for i, own in enumerate(orders(schedule, order, 15 if lower_end else 0)):
        g = (1.0 + eta) * h[i]
        p1, m = float(-np.expm1(-g)), dict[int, float]()
        p2 = p1 / 2 if own == 2 and second == "midpoint" else 1.0 - p1 / g
        _add(m, p1, {0: 1.0})
        slope = {} if own < 2 else _difference(0, h[i - 1] / h[i])
        if own == 3:
            older, sum_r = _difference(1, h[i - 2] / h[i]), (h[i - 1] + h[i - 2]) / h[i]
            share = h[i - 1] / h[i] / sum_r
            bend = {k: (slope.get(k, 0.0) - older.get(k, 0.0)) / sum_r for k in range(3)}
            _add(m, p2 * (1.0 + share), slope)
            _add(m, -p2 * share, older)
            _add(m, -(p2 / g - 0.5), bend)
        else:
            _add(m, p2, slope)
        noise = float(r[i + 1] * np.sqrt(1.0 - (r[i + 1] / r[i]) ** (2.0 * eta)))
        rows.at(i, x={0: float(np.exp(-g))}, m=m, noise=noise)
    return rows.table(prediction)


def dpmpp_2m(schedule: Schedule, prediction: Prediction) -> Table:
    """DPM-Solver++(2M): second order in x0.

    The last row is first order with fewer than 15 rows, as in the reference.
    source      Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint form
    """
    return _multistep(schedule, prediction, 0.0, order=2, second="midpoint", lower_end=True)


def dpmpp_3m(schedule: Schedule, prediction: Prediction) -> Table:
    """DPM-Solver++(3M): third order in x0. source: as diffusers, solver_order 3"""
    return _multistep(schedule, prediction, 0.0, order=3, second="midpoint", lower_end=True)


def dpmpp_2m_sde(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM++ 2M SDE, midpoint form; eta = 0 is 2M. source: k-diffusion's sampler of that name"""
    return _multistep(schedule, prediction, eta, order=2, second="midpoint", lower_end=False)


def dpmpp_2m_sde_heun(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM++ 2M SDE with the exact integral of the slope. source: k-diffusion, solver "heun" """
    return _multistep(schedule, prediction, eta, order=2, second="heun", lower_end=False)


def dpmpp_3m_sde(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM++ 3M SDE; eta = 0 is 3M. source: k-diffusion's sampler of that name"""
    return _multistep(schedule, prediction, eta, order=3, second="heun", lower_end=False)


def _difference(newer: int, spacing: float) -> dict[int, float]:
    """Divided difference of m_(newer) and the one before it, over spacing in units of h."""
    return {newer: 1.0 / spacing, newer + 1: -1.0 / spacing}


def _add(into: dict[int, float], factor: float, weights: Weights) -> None:
    for k, weight in weights.items():
        into[k] = into.get(k, 0.0) + float(factor * weight)
