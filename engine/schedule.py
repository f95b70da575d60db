"""The noise levels of one run: spacings by name, and explicit lists.

Each spacing is a function (Training, steps) -> Schedule. Most end at sigma = 0; `reference`,
`leading`, `quad` and `uniform` end at the level of timestep 0, as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, UnknownName
from .levels import Doubles, Schedule, Training

__all__ = ["SCHEDULES", "Doubles", "Schedule", "Training", "from_sigmas", "from_timesteps", "make"]


def _whole(name: str, training: Training, t: NDArray[np.integer], end: int | None) -> Schedule:
    """A schedule on whole timesteps that ends at timestep `end`, or at sigma = 0 when None."""
    alpha, sigma = training.at(t)
    alpha_end, sigma_end = (1.0, 0.0) if end is None else map(float, training.at(np.array(end)))
    return Schedule(
        name,
        t.astype(np.float64),
        np.append(alpha, alpha_end),
        np.append(sigma, sigma_end),
        start_noise=1.0 if end is not None else float(sigma[0]),
        training=training,
    )


def reference(training: Training, steps: int) -> Schedule:
    """The reference's DDIM spacing, with its step count: T // steps apart, then + 1.

    The number of steps is ceil(T / (T // steps)), not always the one asked for; some counts reach
    past the table and are refused, as they crash there. source: reference ddim "uniform".
    """
    total = training.timesteps
    t = np.arange(0, total, max(total // steps, 1)) + 1
    if t[-1] >= total:
        raise RequestError(
            f"the reference spacing has no schedule of {steps} steps: it would need timestep"
            f" {t[-1]} of {total}",
            hint="use --schedule leading, or another number of steps"
            " (3, 9, 27, 36, 37, 101-111, 251-333 and 501-1000 are affected)",
        )
    return _whole("reference", training, t[::-1].copy(), end=0)


def leading(training: Training, steps: int) -> Schedule:
    """Exactly `steps` levels, T // steps apart, from 1 upwards; ends at timestep 0.

    Equal to `reference` where steps divides T. source: diffusers "leading", steps_offset 1
    """
    t = np.arange(steps) * (training.timesteps // steps) + 1
    return _whole("leading", training, np.minimum(t, training.timesteps - 1)[::-1].copy(), end=0)


def trailing(training: Training, steps: int) -> Schedule:
    """From the last timestep downwards, ends at sigma = 0. source: Lin et al. 2023, table 2"""
    total = training.timesteps
    t = np.round(np.arange(total, 0, -total / steps)[:steps]).astype(np.int64) - 1
    return _whole("trailing", training, t, end=None)


def uniform(training: Training, steps: int) -> Schedule:
    """Uniform in continuous time from 1 to 0.001, the network told fractional timesteps.

    source: Lu et al. 2022, arXiv:2211.01095, skip type "time_uniform", as the reference's --dpm
    """
    total = training.timesteps
    t = np.linspace(1.0, 1.0 / total, steps + 1) * total - 1.0
    alpha, sigma = training.between_log_alpha(t)
    return Schedule("uniform", t[:-1], alpha, sigma, start_noise=1.0, training=training)


def _from_ratios(name: str, training: Training, ratios: Doubles, end: float = 0.0) -> Schedule:
    """Levels given as sigma / alpha, descending; timesteps by log interpolation."""
    times, logs = training.clock
    levels = np.append(ratios, end)
    alpha = 1.0 / np.sqrt(1.0 + levels**2)
    t = np.interp(np.log(ratios), logs, times)
    start = float(levels[0] * alpha[0])
    return Schedule(name, t, alpha, levels * alpha, start_noise=start, training=training)


def linspace(training: Training, steps: int) -> Schedule:
    """Evenly from the last timestep to 0, fractional, ends at sigma = 0. source: k-diffusion"""
    t = np.linspace(training.timesteps - 1.0, 0.0, steps)
    grid = np.arange(training.timesteps)
    return _from_ratios("linspace", training, np.exp(np.interp(t, grid, np.log(training.ratios))))


def karras(training: Training, steps: int, rho: float = 7.0) -> Schedule:
    """Levels even in (sigma / alpha)^(1/rho). source: Karras et al. 2022, eq. 5"""
    low, high = training.ratios[0] ** (1 / rho), training.ratios[-1] ** (1 / rho)
    ramp = np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)
    return _from_ratios("karras", training, (high + ramp * (low - high)) ** rho)


def exponential(training: Training, steps: int) -> Schedule:
    """Levels even in log(sigma / alpha). source: k-diffusion; Lu et al. 2022 "logSNR" """
    high, low = np.log(training.ratios[[-1, 0]])
    return _from_ratios("exponential", training, np.exp(np.linspace(high, low, steps)))


def sgm_uniform(training: Training, steps: int) -> Schedule:
    """As linspace, but with timestep 0 left out: steps + 1 points, the last one dropped.

    source      Stability's generative-models, by the name that ComfyUI gave it
    """
    t = np.linspace(training.timesteps - 1.0, 0.0, steps + 1)[:-1]
    times, logs = training.clock
    return _from_ratios("sgm_uniform", training, np.exp(np.interp(t, times, logs)))


def simple(training: Training, steps: int) -> Schedule:
    """Whole timesteps at even strides from the last one downwards. source: ComfyUI "simple" """
    stride = training.timesteps / steps
    t = training.timesteps - 1 - (np.arange(steps) * stride).astype(np.int64)
    return _whole("simple", training, t, end=None)


def quad(training: Training, steps: int) -> Schedule:
    """Quadratic in the timestep up to 0.8 T, so denser at low noise; ends at timestep 0.

    It begins at timestep 801 of 1000 and drops timesteps that coincide, so that a large count runs
    fewer steps than asked for.
    source      the reference's DDIM "quad", Song et al. 2020, appendix D.2
    """
    t = np.unique((np.linspace(0.0, np.sqrt(0.8 * training.timesteps), steps) ** 2).astype(int)) + 1
    return _whole("quad", training, t[::-1].copy(), end=0)


def lcm(training: Training, steps: int) -> Schedule:
    """Evenly chosen among the 50 timesteps that a consistency model was distilled on.

    source      Luo et al. 2023, arXiv:2310.04378, section 4.3
    """
    taught = max(50, steps)
    grid = np.arange(1, taught + 1) * (training.timesteps // taught) - 1
    chosen = np.floor(np.arange(steps) * (taught / steps)).astype(np.int64)
    return _whole("lcm", training, grid[::-1][chosen], end=None)


def beta(training: Training, steps: int) -> Schedule:
    """Timesteps by the inverse of the beta distribution (0.6, 0.6): dense at both ends.

    Rounded to whole timesteps; ones that coincide are dropped, as ComfyUI does.
    source      Lee et al. 2024, arXiv:2407.12173
    """
    share = beta_quantile(1.0 - np.arange(steps) / steps, 0.6)
    t = np.unique(np.rint(share * (training.timesteps - 1)).astype(np.int64))
    return _whole("beta", training, t[::-1].copy(), end=None)


def beta_quantile(q: Doubles, shape: float) -> Doubles:
    """Where the beta distribution (shape, shape) has the cumulated probability q, in 0..1."""
    mirrored = np.minimum(q, 1.0 - q)  # the distribution is symmetric: x stays below 1/2
    low, high = np.zeros_like(q), np.full_like(q, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        less = _beta_below(middle, shape) < mirrored
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return np.where(q > 0.5, 1.0 - high, high)


def _beta_below(x: Doubles, a: float) -> Doubles:
    """The regularised incomplete beta function I_x(a, a) for x up to 1/2.

    x^a (1 - x)^a / (a B(a, a)) times the hypergeometric series F(2a, 1; a + 1; x), whose terms
    shrink by at least half: 60 of them reach float64. source: NIST DLMF 8.17.8
    """
    term, total = np.ones_like(x), np.ones_like(x)
    for k in range(60):
        term = term * x * (2 * a + k) / (a + 1 + k)
        total += term
    scale = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a)) / a
    return scale * (x * (1 - x)) ** a * total


# sigma / alpha of Stable Diffusion 1.5, the ten steps' levels and the end
_AYS = (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
        0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582)  # fmt: skip


def align_your_steps(training: Training, steps: int) -> Schedule:
    """The levels optimised for Stable Diffusion 1.5, log-linear in between; ends at sigma = 0.

    None were published for 2.x, which has the same training levels: these are borrowed. For a
    model with other training levels (the upscaler) they mean nothing.
    source      Sabour et al. 2024, arXiv:2404.14507, and its published numbers
    """
    at = np.linspace(0.0, len(_AYS) - 1.0, steps + 1)[:-1]
    ratios = np.exp(np.interp(at, np.arange(len(_AYS)), np.log(_AYS)))
    return _from_ratios("align_your_steps", training, ratios)


SCHEDULES: dict[str, Callable[[Training, int], Schedule]] = {
    f.__name__: f
    for f in (
        reference, quad, leading, trailing, uniform, linspace, karras, exponential, sgm_uniform,
        simple, beta, align_your_steps, lcm,
    )
}  # fmt: skip


def make(name: str, training: Training, steps: int) -> Schedule:
    """The schedule called `name`. Raises UnknownName, RequestError."""
    if name not in SCHEDULES:
        raise UnknownName("schedule", name, SCHEDULES)
    if not 1 <= steps <= training.timesteps:
        raise RequestError(
            f"{steps} steps; a run has 1 to {training.timesteps}",
            hint="give --steps a number in that range; 20 to 50 are usual",
        )
    return SCHEDULES[name](training, steps)


def from_sigmas(training: Training, sigmas: Sequence[float]) -> Schedule:
    """An explicit list of sigma / alpha, descending; the last one is where the run ends, often 0.

    raises      RequestError: fewer than two, not descending, or outside what the model knows
    """
    ratios = _descending("sigmas", sigmas, least=2)
    low, high = 0.99 * training.ratios[0], 1.01 * training.ratios[-1]
    known = ratios[:-1] if ratios[-1] == 0.0 else ratios
    outside = known[(known < low) | (known > high)]
    if outside.size:
        raise RequestError(
            f"sigmas holds {outside[0]:g}; this model knows {low:.4g} to {high:.4g}",
            hint="sigmas are sigma / alpha, as k-diffusion counts; only the last may be 0",
        )
    return _from_ratios("sigmas", training, ratios[:-1], end=float(ratios[-1]))


def from_timesteps(training: Training, timesteps: Sequence[float]) -> Schedule:
    """An explicit list of timesteps, descending, whole or not; the run ends at sigma = 0.

    raises      RequestError: empty, not descending, or outside 0..T-1
    """
    t = _descending("timesteps", timesteps, least=1)
    last = training.timesteps - 1
    if t[0] > last:
        raise RequestError(
            f"timesteps holds {t[0]:g}; the last one of this model is {last}",
            hint=f"give timesteps from {last} down to 0",
        )
    times, logs = training.clock
    made = _from_ratios("timesteps", training, np.exp(np.interp(t, times, logs)))
    return replace(made, timesteps=t)


def _descending(name: str, values: Sequence[float], least: int) -> Doubles:
    """Finite numbers from 0 upwards, each smaller than the one before."""
    found = np.array(values, np.float64)
    if len(found) < least:
        raise RequestError(
            f"{name} has {len(found)} numbers; at least {least} are needed",
            hint=f"give {name} as a list, largest first, with commas in between",
        )
    rises = np.append(False, found[1:] >= found[:-1])
    wrong = np.flatnonzero(~np.isfinite(found) | (found < 0) | rises)
    if wrong.size:
        raise RequestError(
            f"number {wrong[0] + 1} of {name} is {found[wrong[0]]:g}; each must be smaller than the"
            " one before it, and none below 0",
            hint=f"give {name} largest first, without repeats",
        )
    return found
