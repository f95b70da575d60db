"""Samplers of first order, one network call a step."""

from __future__ import annotations

import math

from ..levels import Schedule
from ..table import Prediction, Table
from .rows import Rows


def split(before: float, after: float, eta: float) -> tuple[float, float]:
    """(down, up): a step from level `before` to `after` goes down to `down` and adds `up` noise.

    eta = 1 has the variance of ancestral sampling: up^2 = after^2 (1 - after^2 / before^2).
    source      Song et al. 2020, arXiv:2010.02502, eq. 16, in sigma / alpha
    """
    up = eta * after * max(1.0 - (after / before) ** 2, 0.0) ** 0.5
    return max(after**2 - up**2, 0.0) ** 0.5, up


def ddim(schedule: Schedule, prediction: Prediction, eta: float = 0.0) -> Table:
    """DDIM; with eta = 1 it is Euler ancestral: both hold the noise constant over the interval.

    source      Song et al. 2020, arXiv:2010.02502, eq. 12 and 16
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        down, up = split(r[i], r[i + 1], eta)
        rows.at(i, m={0: down - r[i]}, noise=up)
    return rows.table(prediction)


def euler(schedule: Schedule, prediction: Prediction) -> Table:
    """Euler's method in sigma / alpha, which is DDIM's step.

    source      Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn
    """
    return ddim(schedule, prediction)


def lcm(schedule: Schedule, prediction: Prediction) -> Table:
    """Consistency sampling: jump to the picture, then noise it afresh to the next level.

    The boundary weights c_skip and c_out, 0 and 1 to 1e-4 from timestep 5 on, are left out.
    source      Luo et al. 2023, arXiv:2310.04378, algorithm 3
    """
    rows, r = Rows(schedule, "data"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        rows.at(i, x={}, m={0: 1.0}, noise=r[i + 1])
    return rows.table(prediction)


def tcd(schedule: Schedule, prediction: Prediction, eta: float = 0.3) -> Table:
    """Trajectory consistency: down to timestep (1 - eta) t', then noised up to t'; none at the end.

    eta = 0 is DDIM, eta = 1 is consistency sampling. Its paper calls eta gamma.
    source      Zheng et al. 2024, arXiv:2402.19159, algorithm 4
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    times = [*schedule.timesteps[1:].tolist(), 0.0]
    for i, time in enumerate(times):
        lower = (1.0 - eta) * time
        if time.is_integer():
            lower = math.floor(lower)  # as the paper: a level that the model was trained on
        share = schedule.ratio_at(lower) / schedule.ratio_at(time)
        rows.at(i, m={0: share * r[i + 1] - r[i]}, noise=r[i + 1] * (1.0 - share**2) ** 0.5)
    return rows.table(prediction)
