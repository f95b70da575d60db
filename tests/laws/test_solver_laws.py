"""Laws that any correct sampler obeys, on closed forms (laws.py).

Exact line: if the network is exact for one image c and one noise e, every x is alpha c + sigma e.
Gaussian order: for data N(mu, d^2) the probability-flow ODE has a closed form, so that the error of
a run can be measured, and halving the step must divide it by 2^order.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.loop import denoise

from .laws import (
    PREDICTIONS,
    TRAINING,
    as_output,
    even_in_log_snr,
    even_in_ratio,
    gaussian_error,
)


@pytest.mark.parametrize("spacing", schedule.SCHEDULES)
@pytest.mark.parametrize("name", [n for n in solvers.SOLVERS if n != "restart"])
def test_exact_line(name, spacing):
    """Noise off (eta = 0). lcm draws all the same: it is handed e itself, and stays on the line.

    restart adds noise to noise: test_stochastic_laws has its line, mean and variance.
    """
    c, e = np.random.default_rng(7).standard_normal((2, 1, 4, 2, 2))
    for steps, prediction in itertools.product([1, 2, 3, 4, 5, 14, 15, 50], PREDICTIONS):
        if spacing == "reference" and steps == 3:
            continue  # the reference spacing has no schedule of 3 steps (tested elsewhere)
        levels = schedule.make(spacing, TRAINING, steps)
        table = solvers.make(name, levels, prediction, eta=0.0)
        assert table.n.any() <= solvers.SOLVERS[name].noisy

        def predict(x, row, table=table, prediction=prediction):
            return as_output(prediction, table.alphas[row.index], table.sigmas[row.index], c, e)

        x = table.alphas[0] * c + table.sigmas[0] * e
        for step in denoise(table, predict, x, noise=lambda: e):
            after = step.row.index + 1
            line = table.alphas[after] * c + table.sigmas[after] * e
            np.testing.assert_allclose(step.x, line, rtol=0, atol=1e-10)
        assert step.row.index == len(table) - 1
        assert table.alphas[-1] == pytest.approx(levels.alphas[-1], abs=1e-15)
        assert table.sigmas[-1] == pytest.approx(levels.sigmas[-1], abs=1e-15)


# Order with exact starting values: (levels, order). Fixed Adams-Bashforth weights need levels even
# in sigma / alpha. UniPC's corrector adds one to its order.
# DPM++ 3M is of order 2: as published its third divided difference has half its weight
# (docs/numerics.md); SA-Solver's form of order 2 has an error of third order in each step.
ORDERS = {
    "ddim": (even_in_log_snr, 1),
    "euler": (even_in_log_snr, 1),
    "euler_a": (even_in_log_snr, 1),
    "tcd": (even_in_log_snr, 1),
    "heun": (even_in_log_snr, 2),
    "dpm2": (even_in_log_snr, 2),
    "dpm2_a": (even_in_log_snr, 2),
    "dpmpp_2s": (even_in_log_snr, 2),
    "dpmpp_2s_a": (even_in_log_snr, 2),
    "dpmpp_sde": (even_in_log_snr, 2),
    "dpmpp_2m": (even_in_log_snr, 2),
    "dpmpp_2m_sde": (even_in_log_snr, 2),
    "dpmpp_2m_sde_heun": (even_in_log_snr, 2),
    "dpmpp_3m": (even_in_log_snr, 2),
    "dpmpp_3m_sde": (even_in_log_snr, 2),
    "sa_solver": (even_in_log_snr, 2),
    "unipc_2": (even_in_log_snr, 3),
    "unipc_2_bh1": (even_in_log_snr, 3),
    "unipc_3": (even_in_log_snr, 4),
    "unipc_3_bh1": (even_in_log_snr, 4),
    "lms_2": (even_in_log_snr, 2),
    "lms_3": (even_in_log_snr, 3),
    "lms": (even_in_log_snr, 4),
    "deis_2": (even_in_log_snr, 2),
    "deis": (even_in_log_snr, 3),
    "plms": (even_in_ratio, 4),
    "ipndm": (even_in_ratio, 4),
}


def error_ratio(name, prediction, exact_rows):
    levels, _ = ORDERS[name]
    coarse, fine = (gaussian_error(name, levels(n), prediction, exact_rows) for n in (160, 320))
    return coarse / fine


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_with_exact_starting_values(name, prediction):
    exact_rows = 4 if solvers.SOLVERS[name].calls == 1 and name != "dpmpp_2s" else 0
    _, order = ORDERS[name]
    assert error_ratio(name, prediction, exact_rows) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("name", [n for n, (_, order) in ORDERS.items() if order > 1])
def test_real_start_keeps_second_order(name):
    """The first rows are of first order, each once: their error of h^2 bounds the whole run's."""
    assert error_ratio(name, "eps", exact_rows=0) >= 2**2 * 0.95


def test_every_solver_has_an_order():
    assert {*ORDERS, "lcm", "restart"} == set(solvers.SOLVERS)  # these two: stochastic laws


def test_noise_enters_with_the_rows_weight():
    """An exact network and eta = 1: x leaves the line by the noise of the rows, and by no more."""
    table = solvers.make("ddim", even_in_log_snr(6), "eps", eta=1.0)
    c, e = np.random.default_rng(3).standard_normal((2, 1, 4, 2, 2))
    drawn = []

    def noise():
        drawn.append(np.full((1, 4, 2, 2), len(drawn) + 1.0))
        return drawn[-1]

    def predict(x, row):
        return (x - table.alphas[row.index] * c) / table.sigmas[row.index]

    x, rows = table.alphas[0] * c + table.sigmas[0] * e, []
    for step in denoise(table, predict, x, noise):
        i = step.row.index
        eps = (step.before - table.alphas[i] * c) / table.sigmas[i]
        s, s1, a, a1 = table.sigmas[i], table.sigmas[i + 1], table.alphas[i], table.alphas[i + 1]
        sd = s1 / s * np.sqrt(1 - a**2 / a1**2)  # Song et al. 2020, eq. 16
        expected = a1 * c + np.sqrt(s1**2 - sd**2) * eps + sd * drawn[i]
        np.testing.assert_allclose(step.x, expected, rtol=0, atol=1e-12)
        rows.append(i)
    assert rows == list(range(6))
    assert len(drawn) == 6
