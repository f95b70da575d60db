"""Samplers: each a function from a schedule to a table of rows.

None of them sees a latent. Adding one means writing its coefficients, and a line in SOLVERS.
checked by tests/laws (exact line, order on Gaussian data) and tests/golden/test_trajectories.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .errors import RequestError, UnknownName
from .schedule import Doubles, Schedule
from .table import Prediction, Table, assemble


def _transfer(schedule: Schedule, quantity_noise: Doubles) -> tuple[Doubles, Doubles]:
    """Weights (x, eps) of the step x' = alpha' x0 + quantity_noise eps, from eps = const."""
    alpha, sigma, after = schedule.alphas[:-1], schedule.sigmas[:-1], schedule.alphas[1:]
    return after / alpha, quantity_noise - after * sigma / alpha


def ddim(schedule: Schedule, prediction: Prediction, eta: float = 0.0) -> Table:
    """DDIM, first order; eta = 1 has the variance of ancestral sampling.

    source      Song et al. 2020, arXiv:2010.02502, eq. 12 and 16
    """
    a, s = schedule.alphas, schedule.sigmas
    ratio = np.maximum(1.0 - (a[:-1] / a[1:]) ** 2, 0.0)
    noise = eta * s[1:] / s[:-1] * np.sqrt(ratio)
    direction = np.sqrt(np.maximum(s[1:] ** 2 - noise**2, 0.0))
    keep, step = _transfer(schedule, direction)
    return assemble(schedule, prediction, "noise", keep[:, None], step[:, None], noise)


def euler(schedule: Schedule, prediction: Prediction) -> Table:
    """Euler's method in sigma / alpha. It is DDIM's step: both hold eps constant over the interval.

    source      Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn
    """
    return ddim(schedule, prediction)


# Adams-Bashforth weights of the newest noise first, by the number of values at hand.
_ADAMS = {
    1: np.array([1.0]),
    2: np.array([3.0, -1.0]) / 2,
    3: np.array([23.0, -16.0, 5.0]) / 12,
    4: np.array([55.0, -59.0, 37.0, -9.0]) / 24,
}


def plms(schedule: Schedule, prediction: Prediction) -> Table:
    """PLMS: fourth-order Adams-Bashforth on the noise; one call more than there are levels.

    The first step is an improved Euler step: row 0 goes there, row 1 goes again from the same x
    with the mean of both noises. Only row 0's noise enters the later history.
    source      Liu et al. 2022, arXiv:2202.09778, with the reference's start
    """
    steps = len(schedule)
    keep, step = _transfer(schedule, schedule.sigmas[1:])
    a, b = np.zeros((steps + 1, 5)), np.zeros((steps + 1, 5))
    a[0, 0], b[0, 0] = keep[0], step[0]
    a[1, 1], b[1, :2] = keep[0], step[0] / 2
    for i in range(1, steps):
        row, have = i + 1, min(i + 1, 4)
        newest_first = [row, *range(row - 1, 1, -1), 0][:have]
        a[row, 0] = keep[i]
        for value, weight in zip(newest_first, _ADAMS[have], strict=True):
            b[row, row - value] = step[i] * weight
    second = min(1, steps - 1)
    times = np.concatenate([schedule.timesteps[[0, second]], schedule.timesteps[1:]])
    levels = [0, 1, *range(1, steps + 1)]
    return assemble(schedule, prediction, "noise", a, b, levels=levels, times=times)


def dpmpp_2m(schedule: Schedule, prediction: Prediction) -> Table:
    """DPM-Solver++(2M): second order in x0, one call a row.

    The first row is first order, and so is the last one when it lands on sigma = 0 or when there
    are fewer than 15 rows.
    source      Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint form
    """
    lambdas, rows = schedule.lambdas, len(schedule)
    h = np.diff(lambdas)
    step = -schedule.alphas[1:] * np.expm1(-h)
    half = np.zeros(rows)  # weight of (m0 - m1) beside m0
    last = rows - 1 if rows < 15 or schedule.sigmas[-1] == 0.0 else rows
    half[1:last] = 0.5 * h[1:last] / h[: last - 1]
    a = schedule.sigmas[1:] / schedule.sigmas[:-1]
    b = np.stack([step * (1.0 + half), -step * half], axis=1)
    return assemble(schedule, prediction, "data", a[:, None], b)


@dataclass(frozen=True)
class Solver:
    """A sampler by name.

    schedule    what it runs on unless asked otherwise
    title       as AUTOMATIC1111 writes it, for a picture's metadata
    eta         whether it takes one
    """

    table: Callable[..., Table]
    schedule: str
    title: str
    eta: bool = False


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "leading", "DDIM", eta=True),
    "plms": Solver(plms, "leading", "PLMS"),
    "dpmpp_2m": Solver(dpmpp_2m, "uniform", "DPM++ 2M"),
    "euler": Solver(euler, "linspace", "Euler"),
}


def find(name: str) -> Solver:
    """Raises UnknownName with the nearest known names."""
    if name not in SOLVERS:
        raise UnknownName("sampler", name, SOLVERS)
    return SOLVERS[name]


def make(name: str, schedule: Schedule, prediction: Prediction, eta: float = 0.0) -> Table:
    """The table of sampler `name`. Raises UnknownName; RequestError when eta does not apply."""
    solver = find(name)
    if solver.eta:
        return solver.table(schedule, prediction, eta)
    if eta != 0.0:
        refuse_eta(name, eta)
    return solver.table(schedule, prediction)


def refuse_eta(name: str, eta: float) -> NoReturn:
    takers = ", ".join(n for n, s in SOLVERS.items() if s.eta)
    raise RequestError(
        f"sampler {name!r} is deterministic and takes no eta (got {eta:g})",
        hint=f"leave eta out, or use one of: {takers}",
    )
