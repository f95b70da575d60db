"""From training betas to the noise levels of one run.

A level is a pair (alpha, sigma) with alpha^2 + sigma^2 = 1: x = alpha * x0 + sigma * noise. A
Schedule lists the levels that the network is called at, and the one where the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, UnknownName

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """The noise schedule that a model was trained with.

    alphas_cumprod  float64 [T], values rounded to float32 as checkpoints store them
    """

    alphas_cumprod: Doubles

    @classmethod
    def scaled_linear(cls, beta_start: float, beta_end: float, timesteps: int) -> Training:
        """betas = linspace(sqrt(start), sqrt(end), T)^2 (the reference calls it "linear")."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2
        return cls(np.cumprod(1.0 - betas).astype(np.float32).astype(np.float64))

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, t: NDArray[np.integer]) -> tuple[Doubles, Doubles]:
        """(alpha, sigma) at whole timesteps."""
        acp = self.alphas_cumprod[t]
        return np.sqrt(acp), np.sqrt(1.0 - acp)

    def between_log_alpha(self, t: Doubles) -> tuple[Doubles, Doubles]:
        """(alpha, sigma) at fractional timesteps, log alpha linear in between (DPM-Solver)."""
        log_alpha = 0.5 * np.log(self.alphas_cumprod)
        alpha = np.exp(np.interp(t, np.arange(self.timesteps), log_alpha))
        return alpha, np.sqrt(1.0 - alpha**2)

    @property
    def ratios(self) -> Doubles:
        """sigma / alpha at every timestep: the noise level in k-diffusion's coordinates."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)


@dataclass(frozen=True)
class Schedule:
    """N network calls and the level after the last.

    timesteps   float64 [N], what the network is told; may be fractional
    alphas      float64 [N+1]
    sigmas      float64 [N+1]; the last may be 0
    start_noise how much unit noise the first x holds: 1 as the reference does, or sigmas[0]
    start_scale how much of a picture's latent it holds: 0 where a run begins with noise alone
    """

    name: str
    timesteps: Doubles
    alphas: Doubles
    sigmas: Doubles
    start_noise: float
    start_scale: float = 0.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def lambdas(self) -> Doubles:
        """log(alpha / sigma) [N+1]; infinite where sigma is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)

    def tail(self, calls: int, *, above: bool = False) -> Schedule:
        """The last `calls` of its network calls, begun from a picture and noise: img2img.

        calls   1..N
        above   noise the picture one level higher than the first call is told, as the reference
                does (reference-spec 3.7); at the top there is none higher
        """
        first = len(self) - calls
        assert 0 <= first < len(self), f"{calls} calls of {len(self)}"
        level = max(first - 1, 0) if above else first
        return replace(
            self,
            timesteps=self.timesteps[first:],
            alphas=self.alphas[first:],
            sigmas=self.sigmas[first:],
            start_noise=float(self.sigmas[level]),
            start_scale=float(self.alphas[level]),
        )


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
    return Schedule("uniform", t[:-1], alpha, sigma, start_noise=1.0)


def _from_ratios(name: str, training: Training, ratios: Doubles) -> Schedule:
    """Levels given as sigma / alpha, descending, ending at 0; timesteps by log interpolation."""
    known = np.log(training.ratios)
    t = np.interp(np.log(ratios), known, np.arange(training.timesteps, dtype=np.float64))
    levels = np.append(ratios, 0.0)
    alpha = 1.0 / np.sqrt(1.0 + levels**2)
    return Schedule(name, t, alpha, levels * alpha, start_noise=float(levels[0] * alpha[0]))


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


SCHEDULES: dict[str, Callable[[Training, int], Schedule]] = {
    f.__name__: f for f in (reference, leading, trailing, uniform, linspace, karras)
}


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
