"""A table written row by row, in the coordinates in which samplers are published.

There a latent is z = x / alpha, its level r = sigma / alpha, and a row reads

    z' = sum_k x[k] * z_(i-k)  +  sum_k m[k] * m_(i-k)  +  noise * unit noise

so that a step which holds the noise constant is z + (r' - r) eps. Rows puts the alphas back.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..levels import Doubles, Schedule
from ..table import HISTORY, Prediction, Quantity, Table, convert

Weights = Mapping[int, float]
STAY: Weights = {0: 1.0}


class _Row(NamedTuple):
    ratio: float
    time: float
    x: Weights
    m: Weights
    noise: float
    interval: tuple[float, float] | None


class Rows:
    """The rows of one run on a schedule; m is x0 ("data") or the noise ("noise")."""

    def __init__(self, schedule: Schedule, quantity: Quantity) -> None:
        self._schedule, self._quantity = schedule, quantity
        self._ratios, self._rows = schedule.ratios, list[_Row]()

    def at(
        self,
        level: int,
        x: Weights = STAY,
        m: Weights = STAY,
        noise: float = 0.0,
        time: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """A row whose latent lies at the schedule's level of that number, its end included.

        time        what the network is told; default the schedule's timestep of that level
        interval    (from, to) of the noise; default the row's own two levels
        """
        ratio = float(self._ratios[level])
        if time is None:
            known = level < len(self._schedule)
            time = self._schedule.timesteps[level] if known else self._schedule.time_at(ratio)
        self._rows.append(_Row(ratio, float(time), x, m, noise, interval))

    def between(
        self,
        ratio: float,
        x: Weights = STAY,
        m: Weights = STAY,
        noise: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """A row whose latent lies at a level that the schedule has not."""
        time = self._schedule.time_at(ratio)
        self._rows.append(_Row(ratio, time, x, m, noise, interval))

    def table(self, prediction: Prediction) -> Table:
        rows, schedule = self._rows, self._schedule
        ratios = np.array([row.ratio for row in rows] + [float(self._ratios[-1])])
        alphas = 1.0 / np.sqrt(1.0 + ratios**2)
        sigmas = ratios * alphas
        px, po = convert(prediction, self._quantity, alphas[:-1], sigmas[:-1])
        pairs = pairwise(ratios.tolist())
        return Table(
            t=np.array([row.time for row in rows]),
            px=px,
            po=po,
            a=_spread([row.x for row in rows]) * alphas[1:, None] / _before(alphas[:-1]),
            b=_spread([row.m for row in rows]) * alphas[1:, None],
            n=np.array([row.noise for row in rows]) * alphas[1:],
            alphas=alphas,
            sigmas=sigmas,
            intervals=np.array([r.interval or own for r, own in zip(rows, pairs, strict=True)]),
            quantity=self._quantity,
            guidance=np.ones(len(rows)),
            graphs=("full",) * len(rows),
            start_noise=schedule.start_noise,
            start_scale=schedule.start_scale,
        )


def orders(schedule: Schedule, most: int, short: int = 15) -> list[int]:
    """The order of each row: it grows from 1 at the start, and falls to 1 at a short run's end.

    short       runs of fewer rows fall; 15 as DPM-Solver's authors have it
    A row that lands on sigma = 0 is first order always.
    """
    rows = len(schedule)
    found = [min(i + 1, most, rows - i if rows < short else most) for i in range(rows)]
    if schedule.sigmas[-1] == 0.0:
        found[-1] = 1
    return found


def _spread(weights: list[Weights]) -> Doubles:
    """[R, HISTORY] from one mapping a row."""
    spread = np.zeros((len(weights), HISTORY))
    for i, row in enumerate(weights):
        for k, weight in row.items():
            spread[i, k] = weight
    return spread


def _before(alphas: Doubles) -> Doubles:
    """alpha of x_(i-k), [R, HISTORY]; 1 where there was none."""
    padded = np.concatenate([np.ones(HISTORY - 1), alphas])
    return np.stack([padded[HISTORY - 1 - k :][: len(alphas)] for k in range(HISTORY)], axis=1)
