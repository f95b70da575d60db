"""What the loop itself costs: microseconds a row, network excluded, for every sampler.

    python bench/micro/loop.py [SAMPLER ...]

Median of runs of 50 steps on one latent, with a network that returns the same array at once. One
thread; noise is a stored array. Budget: 60 us a row for dpmpp_2m at 1x4x64x64.
"""

from __future__ import annotations

import statistics
import sys
from time import perf_counter

import numpy as np

from sdengine.engine import schedule, solvers
from sdengine.engine.loop import denoise

SIZES = ((1, 4, 64, 64), (1, 4, 96, 96))
RUNS, STEPS = 15, 50


def row_us(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(median, fastest) microseconds a row."""
    training = schedule.Training.scaled_linear(0.00085, 0.012, 1000)
    levels = schedule.make(solvers.find(name).schedule, training, STEPS)
    table = solvers.make(name, levels, "v")
    x, out, noise = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    found = []
    for _ in range(RUNS):
        start = perf_counter()
        for _ in denoise(table, lambda x, row: out, x, lambda: noise):
            pass
        found.append((perf_counter() - start) / len(table) * 1e6)
    return statistics.median(found), min(found)


def main() -> None:
    heads = [f"{'x'.join(map(str, shape))} us/row" for shape in SIZES]
    sys.stdout.write(f"{'sampler':20s}{heads[0]:>24s}{heads[1]:>24s}   (median, fastest)\n")
    for name in sys.argv[1:] or solvers.SOLVERS:
        cells = [f"{median:12.1f}{fastest:12.1f}" for median, fastest in
                 (row_us(name, shape) for shape in SIZES)]  # fmt: skip
        sys.stdout.write(f"{name:20s}{''.join(cells)}\n")


if __name__ == "__main__":
    main()
