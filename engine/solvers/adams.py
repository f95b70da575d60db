"""Multistep samplers that integrate a polynomial through the noises met so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..levels import Doubles, Schedule
from ..table import Prediction, Table
from .rows import Rows, orders

# Adams-Bashforth weights of the newest noise first, by the number of values at hand.
_EVEN = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def integrate(
    nodes: Sequence[float], low: float, high: float, density: Callable[[Doubles], Doubles]
) -> list[float]:
    """Integral from low to high of density(u) L_j(u), for the Lagrange polynomial of each node.

    By Gauss and Legendre with 32 points: exact to float64 for the smooth densities used here.
    """
    u = (high + low) / 2 + (high - low) / 2 * _NODES
    measure = _WEIGHTS * (high - low) / 2 * density(u)
    found = []
    for j, own in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        basis = np.prod([(u - other) / (own - other) for other in others], axis=0)
        found.append(float(np.sum(measure * basis)))
    return found


def plms(schedule: Schedule, prediction: Prediction) -> Table:
    """PLMS: fourth-order Adams-Bashforth on the noise; one call more than there are levels.

    The first step is an improved Euler step: row 0 goes there, row 1 goes again from the same x
    with the mean of both noises. Only row 0's noise enters the later history. With one level there
    is no further one to be told of: one Euler step, as diffusers; the reference asks a second time
    at the level that x has left.
    source      Liu et al. 2022, arXiv:2202.09778, with the reference's start
    """
    rows, r, steps = Rows(schedule, "noise"), schedule.ratios.tolist(), len(schedule)
    h = [after - before for before, after in pairwise(r)]
    rows.at(0, m={0: h[0]})
    if steps == 1:
        return rows.table(prediction)
    time = float(schedule.timesteps[1])
    rows.at(1, x={1: 1.0}, m={0: h[0] / 2, 1: h[0] / 2}, time=time)
    for i in range(1, steps):
        row, weights = i + 1, _EVEN[min(i + 1, 4)]
        newest_first = [row, *range(row - 1, 1, -1), 0]
        m = {row - at: h[i] * w for at, w in zip(newest_first, weights, strict=False)}
        rows.at(i, m=m)
    return rows.table(prediction)


def ipndm(schedule: Schedule, prediction: Prediction) -> Table:
    """PLMS's weights without its extra call: the order grows from 1 to 4 over the first rows.

    source      Zhang & Chen 2022, arXiv:2204.13902, section 3.3 "iPNDM"
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        weights = _EVEN[min(i + 1, 4)]
        rows.at(i, m={k: (r[i + 1] - r[i]) * w for k, w in enumerate(weights)})
    return rows.table(prediction)


def lms(schedule: Schedule, prediction: Prediction, order: int = 4) -> Table:
    """Linear multistep: the polynomial in sigma / alpha through the last `order` noises.

    source      Adams-Bashforth on uneven steps, as k-diffusion's LMS
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i in range(len(schedule)):
        nodes = r[i::-1][:order]
        m = integrate(nodes, r[i], r[i + 1], np.ones_like)
        rows.at(i, m=dict(enumerate(m)))
    return rows.table(prediction)


def deis(schedule: Schedule, prediction: Prediction, order: int = 3) -> Table:
    """DEIS: the polynomial in log(sigma / alpha), integrated over sigma / alpha.

    The order falls to 1 at the end of a run of fewer than 15 rows.
    source      Zhang & Chen 2022, arXiv:2204.13902, eq. 15, "log rho" as diffusers has it
    """
    rows, r = Rows(schedule, "noise"), schedule.ratios.tolist()
    for i, own in enumerate(orders(schedule, order)):
        if r[i + 1] == 0.0:
            rows.at(i, m={0: -r[i]})
            continue
        logs = [float(np.log(ratio / r[i])) for ratio in r[i::-1][:own]]
        m = integrate(logs, 0.0, float(np.log(r[i + 1] / r[i])), np.exp)
        rows.at(i, m={k: r[i] * weight for k, weight in enumerate(m)})
    return rows.table(prediction)
