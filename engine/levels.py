"""Noise levels: those that a model was trained with, and those of one run.

A level is a pair (alpha, sigma) with alpha^2 + sigma^2 = 1: x = alpha * x0 + sigma * noise. A
Schedule lists the levels that the network is called at, and the one where the run ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

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

    def zero_snr(self) -> Training:
        """These levels stretched so that the last one holds (almost) no picture.

        sqrt(alphas_cumprod) is shifted and scaled: the first stays, the last becomes 2^-12, the
        nearest that keeps sigma / alpha finite. Only a v model can start there.
        source      Lin et al. 2023, arXiv:2305.08891, algorithm 1; 2^-24 as diffusers has it
        """
        alpha = np.sqrt(self.alphas_cumprod)
        stretched = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return Training(np.append(stretched[:-1], 2.0**-24))

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

    @property
    def clock(self) -> tuple[Doubles, Doubles]:
        """(timesteps, log(sigma / alpha)), both rising."""
        return np.arange(self.timesteps, dtype=np.float64), np.log(self.ratios)


@dataclass(frozen=True)
class Schedule:
    """N network calls and the level after the last.

    timesteps   float64 [N], what the network is told; may be fractional
    alphas      float64 [N+1]
    sigmas      float64 [N+1]; the last may be 0
    start_noise how much unit noise the first x holds: 1 as the reference does, or sigmas[0]
    start_scale how much of a picture's latent it holds: 0 where a run begins with noise alone
    training    the levels between which a solver may call the network; without them, it
                interpolates between its own
    """

    name: str
    timesteps: Doubles
    alphas: Doubles
    sigmas: Doubles
    start_noise: float
    start_scale: float = 0.0
    training: Training | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def lambdas(self) -> Doubles:
        """log(alpha / sigma) [N+1]; infinite where sigma is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)

    @property
    def ratios(self) -> Doubles:
        """sigma / alpha [N+1]."""
        return self.sigmas / self.alphas

    @property
    def clock(self) -> tuple[Doubles, Doubles]:
        """(timesteps, log(sigma / alpha)), both rising: what lies between is interpolated."""
        if self.training is not None:
            return self.training.clock
        return self.timesteps[::-1], np.log(self.ratios[:-1][::-1])

    def time_at(self, ratio: float) -> float:
        """The timestep, fractional, of a level sigma / alpha; the nearest known one outside."""
        times, logs = self.clock
        return float(np.interp(np.log(max(ratio, 1e-300)), logs, times))

    def ratio_at(self, time: float) -> float:
        """sigma / alpha at a fractional timestep."""
        times, logs = self.clock
        return float(np.exp(np.interp(time, times, logs)))

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
