"""The guidance column of a table: which rows are guided, and how much. They write, never run.

A row of scale 1 runs the conditional half alone, at half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .errors import RequestError
from .levels import Doubles
from .table import Table


def guided_between(table: Table, scale: float, low: float, high: float) -> Table:
    """Guidance in the rows whose level sigma / alpha lies above `low` and up to `high`; 1 outside.

    Levels, not shares of the run, so that one pair means the same on every schedule, with every
    step count and in the tail of one, as its authors have it.
    source      Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 6
    raises      RequestError unless 0 <= low < high
    """
    if not 0.0 <= low < high:
        raise RequestError(
            f"a guidance interval from {low:g} to {high:g}; it must rise, from 0 upwards",
            hint="give two noise levels sigma / alpha, low then high, such as 0.3 and 5;"
            " a run goes from about 14.6 down to 0",
        )
    ratios = levels(table)
    on = (ratios > low) & (ratios <= high)
    return replace(table, guidance=np.where(on, float(scale), 1.0))


def guided_by(table: Table, scales: Sequence[float]) -> Table:
    """One scale for each row; Heun's kind has two rows a step.

    raises      RequestError when there are not as many as rows, or one is no number
    """
    found = np.array(scales, np.float64)
    if len(found) != len(table):
        raise RequestError(
            f"{len(found)} guidance scales for {len(table)} rows",
            hint=f"give {len(table)}: one for each network call of this sampler and step count",
        )
    if not np.isfinite(found).all():
        at = int(np.flatnonzero(~np.isfinite(found))[0])
        raise RequestError(
            f"guidance scale {at + 1} is {found[at]}", hint="give finite numbers; 1 is no guidance"
        )
    return replace(table, guidance=found)


def cfg_plus_plus(table: Table, share: float) -> Table:
    """CFG++ with guidance `share`, 0..1, as scales of ordinary guidance.

    CFG++ takes x0 from the guided noise and goes on with the unguided one. In sigma / alpha a row
    of first order is  z + (down - r) eps;  CFG++ makes of it  z - r eps_guided + down eps_uncond,
    which is the same row with the scale  share * r / (r - down).
    source      Chung et al. 2024, arXiv:2406.08070, algorithm 1
    raises      RequestError for a sampler with history, which would need both noises kept apart
    """
    if not 0.0 <= share <= 1.0:
        raise RequestError(
            f"CFG++ with guidance {share:g}; it interpolates and never goes past 1",
            hint="give 0 to 1; 0.6 is about as strong as a guidance of 7.5",
        )
    if table.depth > 1 or table.quantity != "noise":
        raise RequestError(
            "CFG++ needs a sampler of first order: one that goes on with the noise of this row",
            hint="use ddim, euler or euler_a with CFG++",
        )
    step = -table.b[:, 0] / table.alphas[1:]
    return replace(table, guidance=share * levels(table) / step)


def levels(table: Table) -> Doubles:
    """sigma / alpha of the latent that each row hands to the network, [R]."""
    return table.sigmas[:-1] / table.alphas[:-1]
