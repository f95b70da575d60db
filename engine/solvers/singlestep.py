"""Samplers that call the network twice a step: the second row goes again from the first row's x.

A step that lands on sigma = 0 is one Euler row: no network knows a level below the last.
"""

from __future__ import annotations

import math

from ..levels import Schedule
from ..table import Prediction, Table
from .first import split
from .rows import Rows


def heun(schedule: Schedule, prediction: Prediction) -> Table:
    """Heun's method in sigma / alpha: the mean of the noises at both ends of the step.

    source      Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        _heun_step(rows, r, i)
    return rows.table(prediction)


def _heun_step(rows: Rows, r: list[float], i: int, noise: float = 0.0) -> None:
    h = r[i + 1] - r[i]
    rows.at(i, m={0: h})
    if r[i + 1] > 0.0:
        rows.at(i + 1, x={1: 1.0}, m={0: h / 2, 1: h / 2}, noise=noise)


def restart(schedule: Schedule, prediction: Prediction) -> Table:
    """Heun, with the part from level 2 to level 0.1 run twice: noise leads back up to 2.

    The schedule's own levels are used again, so that the run is that much longer. A schedule that
    has no level between is Heun's alone.
    source      Xu et al. 2023, arXiv:2306.14878, algorithm 1; levels as AUTOMATIC1111 has them
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    known = r[:-1] if r[-1] == 0.0 else r
    high, low = (min(range(len(known)), key=lambda k: abs(known[k] - at)) for at in (2.0, 0.1))
    up = max(r[high] ** 2 - r[low] ** 2, 0.0) ** 0.5
    again = range(high, low) if high < low - 1 else range(0)
    for i in range(low):
        _heun_step(rows, r, i, noise=up if again and i + 1 == low else 0.0)
    for i in [*again, *range(low, len(schedule))]:
        _heun_step(rows, r, i)
    return rows.table(prediction)


def dpm2(schedule: Schedule, prediction: Prediction) -> Table:
    """DPM-Solver-2 as k-diffusion has it: the noise at the middle in log(sigma / alpha)."""
    return dpm2_a(schedule, prediction, eta=0.0)


def dpm2_a(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM2 with an ancestral step: eta of its variance is added anew.

    source      Karras et al. 2022, section 5 (midpoint); k-diffusion "dpm_2_ancestral"
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        down, up = split(r[i], r[i + 1], eta)
        if down == 0.0:
            rows.at(i, m={0: -r[i]}, noise=up)
            continue
        middle = (r[i] * down) ** 0.5
        rows.at(i, m={0: middle - r[i]})
        rows.between(middle, x={1: 1.0}, m={0: down - r[i]}, noise=up, interval=(r[i], r[i + 1]))
    return rows.table(prediction)


def dpmpp_2s(schedule: Schedule, prediction: Prediction) -> Table:
    """DPM-Solver++(2S) on pairs of the schedule's steps: as many calls as there are levels.

    Every second row goes again from the x before, over both steps, with the slope that the pair
    has shown. A step left over is first order, and so are those of a pair that lands on sigma = 0.
    source      Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r1 as the pair has it
    """
    rows, r, i = Rows(schedule, "data"), schedule.ratios.tolist(), 0
    while i < len(schedule):
        rows.at(i, x={0: r[i + 1] / r[i]}, m={0: 1.0 - r[i + 1] / r[i]})
        i += 1
        if i < len(schedule) and r[i + 1] > 0.0:
            ratio, before = r[i + 1] / r[i - 1], r[i] / r[i - 1]
            share = 0.5 * math.log(ratio) / math.log(before)  # 1 / (2 r1)
            step = 1.0 - ratio
            rows.at(i, x={1: ratio}, m={0: step * share, 1: step * (1.0 - share)})
            i += 1
    return rows.table(prediction)


def dpmpp_2s_a(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM++ 2S ancestral: DPM-Solver++(2S), r1 = 1/2, to a lower level, then noise.

    source      k-diffusion "dpmpp_2s_ancestral"; Lu et al. 2022, algorithm 1
    """
    rows, r = Rows(schedule, "data"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        down, up = split(r[i], r[i + 1], eta)
        if down == 0.0:
            rows.at(i, x={}, m={0: 1.0}, noise=up)
            continue
        middle = (r[i] * down) ** 0.5
        rows.at(i, x={0: middle / r[i]}, m={0: 1.0 - middle / r[i]})
        rows.between(
            middle,
            x={1: down / r[i]},
            m={0: 1.0 - down / r[i]},
            noise=up,
            interval=(r[i], r[i + 1]),
        )
    return rows.table(prediction)


def dpmpp_sde(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> Table:
    """DPM++ SDE, r = 1/2: noise in the half step and in the whole one, each from the same x.

    The whole step's noise is the half step's and what falls after it, as on one Brownian path in
    sigma / alpha; the half step's is read back off x. Were the two independent, the variance of 20
    steps on Gaussian data would be 17 % too low, not 0.9 % (docs/numerics.md).
    source      k-diffusion "dpmpp_sde"; Lu et al. 2022, algorithm 1 for the SDE
    """
    rows, r = Rows(schedule, "data"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        if r[i + 1] == 0.0:
            rows.at(i, x={}, m={0: 1.0})
            continue
        middle = (r[i] * r[i + 1]) ** 0.5
        half, up = split(r[i], middle, eta)
        keep = half / r[i]
        rows.at(i, x={0: keep}, m={0: 1.0 - keep}, noise=up)
        down, whole = split(r[i], r[i + 1], eta)
        shared = (r[i] - middle) / (r[i] - r[i + 1])  # of the path's variance: r counts its time
        back = (
            whole * shared**0.5 / up if up > 0.0 else 0.0
        )  # weight of: z - keep z1 - (1 - keep) m1
        x = {0: back, 1: down / r[i] - back * keep}
        m = {0: 1.0 - down / r[i], 1: -back * (1.0 - keep)}
        rows.between(middle, x=x, m=m, noise=whole * (1.0 - shared) ** 0.5)
    return rows.table(prediction)
