"""Laws that any correct sampler obeys. They share no code with the samplers.

Exact line: if the network is exact for one image c and one noise e, every x is alpha c + sigma e.
Gaussian order: for data N(mu, d^2) the probability-flow ODE has a closed form, so that the error of
a run can be measured, and halving the step must divide it by 2^order.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.loop import denoise
from sdengine.engine.schedule import Schedule, Training

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
PREDICTIONS = ("eps", "v")


def as_output(prediction, alpha, sigma, x0, eps):
    """What a perfect network of this prediction type answers."""
    return eps if prediction == "eps" else alpha * eps - sigma * x0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 14, 15, 50])
@pytest.mark.parametrize("spacing", schedule.SCHEDULES)
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_exact_line(name, spacing, steps, prediction):
    if spacing == "reference" and steps == 3:
        pytest.skip("the reference spacing has no schedule of 3 steps (tested elsewhere)")
    table = solvers.make(name, schedule.make(spacing, TRAINING, steps), prediction)
    c, e = np.random.default_rng(7).standard_normal((2, 1, 4, 8, 8))

    def predict(x, row):
        return as_output(prediction, table.alphas[row.index], table.sigmas[row.index], c, e)

    x = table.alphas[0] * c + table.sigmas[0] * e
    for step in denoise(table, predict, x):
        after = step.row.index + 1
        line = table.alphas[after] * c + table.sigmas[after] * e
        np.testing.assert_allclose(step.x, line, rtol=0, atol=1e-10)
    assert step.row.index == len(table) - 1


def even_in_log_snr(steps):
    lambdas = np.linspace(-2.0, 2.5, steps + 1)
    return from_lambdas(lambdas)


def even_in_ratio(steps):
    """Even in sigma / alpha: the variable that PLMS's fixed Adams-Bashforth weights assume."""
    return from_lambdas(-np.log(np.linspace(np.exp(1.2), np.exp(-1.2), steps + 1)))


def from_lambdas(lambdas):
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    sigmas = np.sqrt(1 - alphas**2)
    return Schedule("law", np.arange(len(lambdas) - 1.0), alphas, sigmas, start_noise=1.0)


def gaussian_error(name, levels, prediction, mu=0.7, d=0.4):
    """Distance of a run's end from the closed-form answer, for data N(mu, d^2)."""
    table = solvers.make(name, levels, prediction)

    def predict(x, row):
        alpha, sigma = table.alphas[row.index], table.sigmas[row.index]
        spread = alpha**2 * d**2 + sigma**2
        x0 = mu + d**2 * alpha / spread * (x - alpha * mu)
        return as_output(prediction, alpha, sigma, x0, (x - alpha * x0) / sigma)

    x = np.linspace(-2, 2, 9).reshape(1, 1, 3, 3)
    *_, last = denoise(table, predict, x)
    spread = levels.alphas**2 * d**2 + levels.sigmas**2
    exact = levels.alphas[-1] * mu + np.sqrt(spread[-1] / spread[0]) * (x - levels.alphas[0] * mu)
    return np.abs(last.x - exact).max()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "levels", "order"),
    [
        ("ddim", even_in_log_snr, 1),
        ("euler", even_in_log_snr, 1),
        ("dpmpp_2m", even_in_log_snr, 2),
        # the start (three short rows) is of lower order, its share of the error too small to show
        ("plms", even_in_ratio, 4),
    ],
)
def test_order_on_gaussian_data(name, levels, order, prediction):
    coarse, fine = (gaussian_error(name, levels(steps), prediction) for steps in (160, 320))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_every_solver_has_an_order_test():
    named = {mark.args[1][i][0] for mark in test_order_on_gaussian_data.pytestmark
             for i in range(len(mark.args[1])) if mark.args[0] != "prediction"}  # fmt: skip
    assert named == set(solvers.SOLVERS)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_keeps_the_variance_of_gaussian_data(eta, prediction):
    """With a perfect network for N(0, 1) data, x stays N(0, 1) at every level, whatever eta.

    Carried exactly: for this data the network's answer is linear in x, so the variance of x_(i+1)
    follows from the row's coefficients. source: x = alpha x0 + sigma eps has variance 1
    """
    levels = even_in_log_snr(2000)
    table = solvers.make("ddim", levels, prediction, eta=eta)
    variance = 1.0
    for i in range(len(table)):
        alpha, sigma = table.alphas[i], table.sigmas[i]
        x0, eps = alpha, sigma  # E[x0 | x] = alpha x and E[eps | x] = sigma x
        m = table.px[i] + table.po[i] * as_output(prediction, alpha, sigma, x0, eps)
        variance = (table.a[i, 0] + table.b[i, 0] * m) ** 2 * variance + table.n[i] ** 2
    assert variance == pytest.approx(1.0, abs=5e-3)
    assert (table.n > 0).all()


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
