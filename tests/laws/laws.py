"""Closed forms that any correct sampler meets. They share no code with the samplers."""

from __future__ import annotations

import numpy as np

from sdengine.engine import solvers
from sdengine.engine.loop import denoise
from sdengine.engine.schedule import Schedule, Training

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
PREDICTIONS = ("eps", "v")
MU, D = 0.7, 0.4  # the Gaussian data of the laws


def as_output(prediction, alpha, sigma, x0, eps):
    """What a perfect network of this prediction type answers."""
    return eps if prediction == "eps" else alpha * eps - sigma * x0


def even_in_log_snr(steps):
    return from_lambdas(np.linspace(-2.0, 2.5, steps + 1))


def even_in_ratio(steps):
    """Even in sigma / alpha: the variable that fixed Adams-Bashforth weights assume."""
    return from_lambdas(-np.log(np.linspace(np.exp(1.2), np.exp(-1.2), steps + 1)))


def from_lambdas(lambdas):
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    sigmas = np.sqrt(1 - alphas**2)
    return Schedule("law", np.arange(len(lambdas) - 1.0)[::-1], alphas, sigmas, start_noise=1.0)


def perfect(table, prediction, mu=MU, d=D, shift=1.0):
    """The network that is exact for data N(mu, d^2). `shift` is the constant 1, where x holds the
    coefficients of an affine function instead of numbers."""

    def predict(x, row):
        alpha, sigma = table.alphas[row.index], table.sigmas[row.index]
        spread = alpha**2 * d**2 + sigma**2
        x0 = mu * shift + d**2 * alpha / spread * (x - alpha * mu * shift)
        return as_output(prediction, alpha, sigma, x0, (x - alpha * x0) / sigma)

    return predict


def flow(x, alphas, sigmas, to, mu=MU, d=D):
    """The exact probability-flow ODE from level 0 to level `to`."""
    spread = alphas**2 * d**2 + sigmas**2
    return alphas[to] * mu + np.sqrt(spread[to] / spread[0]) * (x - alphas[0] * mu)


def gaussian_error(name, levels, prediction, exact_rows=0):
    """Distance of a run's end from the closed form, noise off.

    exact_rows      the first so many rows are handed the exact x instead of their own
    """
    table = solvers.make(name, levels, prediction, eta=0.0)
    x = np.linspace(-2, 2, 9).reshape(1, 1, 3, 3)

    def settle(found, row):
        if row.index >= exact_rows:
            return found
        return flow(x, table.alphas, table.sigmas, row.index + 1)

    *_, last = denoise(table, perfect(table, prediction), x, settle=settle)
    return np.abs(last.x - flow(x, table.alphas, table.sigmas, -1)).max()


def moments(name, levels, prediction, mu=MU, d=D, **options):
    """(mean, variance) of a run's end, carried exactly: no draws.

    For this data the network is affine in x, so that every x is a number, times the start, plus a
    weight for each draw. The loop runs on these coefficients: [1, start, draw 0, draw 1, ...].
    """
    table = solvers.make(name, levels, prediction, **options)
    draws = int(np.count_nonzero(table.n))
    basis = np.eye(2 + draws).reshape(2 + draws, 1, 1, 1, -1)
    units = iter(basis[2:])
    network = perfect(table, prediction, mu, d, shift=basis[0])
    *_, last = denoise(table, network, basis[1], noise=lambda: next(units))
    assert next(units, None) is None
    constant, start, *weights = last.x.ravel()
    alpha, sigma = table.alphas[0], table.sigmas[0]
    variance = start**2 * (alpha**2 * d**2 + sigma**2) + np.sum(np.square(weights))
    return constant + start * alpha * mu, variance
