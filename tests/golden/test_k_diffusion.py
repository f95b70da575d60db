"""Every x that k-diffusion's samplers hand to a small fixed network, in float64.

Reference: k-diffusion 0.1.1.post1, recorded by tests/golden/record_k_diffusion.py, with noises of
ours, so that no Brownian path stands between.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.loop import denoise
from sdengine.engine.schedule import Training

RECORD = json.loads((Path(__file__).parent / "data" / "k_diffusion.json").read_text())
TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)


@pytest.mark.parametrize("run", RECORD["runs"])
def test_every_latent(run):
    name, _, eta = run.partition("_eta_")
    expected = RECORD["runs"][run]
    levels = schedule.from_sigmas(TRAINING, RECORD["karras"])
    table = solvers.make(name, levels, "eps", eta=float(eta) if eta else None)
    drawn = np.reshape(expected["noise_between"], (-1, 2))
    noises = np.array(RECORD["noises"])
    if name == "dpmpp_sde":
        noises, drawn = after_the_half_step(noises, drawn)
    weights, noises = np.array(RECORD["weights"]), iter(noises)
    x = np.array(RECORD["start"]) * levels.sigmas[0]
    steps = list(denoise(table, lambda x, _: np.tanh(weights @ x) + x / 2, x, lambda: next(noises)))
    found = [*(step.before for step in steps), steps[-1].x]
    # their LMS integrates numerically, to 1e-4 asked
    atol = 1e-6 if name == "lms" else 1e-11
    np.testing.assert_allclose(found, expected["fed"], rtol=0, atol=atol)
    np.testing.assert_allclose(table.intervals[table.n != 0], drawn, rtol=1e-12)


def after_the_half_step(noises, drawn):
    """What falls in the second half of each step, where they asked for the half and the whole.

    Of a Brownian path W over [r, r'] with a point s between: W(r, r') = W(r, s) + W(s, r'), each
    divided by the root of its length.
    """
    noises, drawn = noises.copy(), drawn.copy()
    for i in range(0, len(drawn), 2):
        (start, middle), (_, end) = drawn[i], drawn[i + 1]
        both, half = noises[i + 1] * np.sqrt(start - end), noises[i] * np.sqrt(start - middle)
        noises[i + 1] = (both - half) / np.sqrt(middle - end)
        drawn[i + 1, 0] = middle
    return noises, drawn


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_levels(name):
    """Theirs from 0.0292 to 14.61; ours between the same ends."""
    ends = np.array([14.61, 0.0292])
    alphas_cumprod = 1 / (1 + ends[::-1] ** 2)
    made = schedule.make(name, Training(alphas_cumprod), 2)
    np.testing.assert_allclose(made.ratios[:2], ends, rtol=1e-12)
    dense = Training(np.append(alphas_cumprod[0], np.linspace(0.9, alphas_cumprod[1], 20)))
    found = schedule.make(name, dense, len(RECORD[name]) - 1).ratios
    np.testing.assert_allclose(found, RECORD[name], rtol=1e-12)
