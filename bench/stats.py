"""Figures of several measurements: where they lie, and how far a ratio can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 2000  # of the bootstrap; its interval then moves by about one percent of its width
SEED = 20261123  # the same interval each time it is computed


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """median, p10, p90, n and the samples themselves, in plain JSON types; {} for no samples."""
    if not samples:
        return {}
    low, middle, high = np.quantile(samples, [0.1, 0.5, 0.9])
    figures = {"median": float(middle), "p10": float(low), "p90": float(high), "n": len(samples)}
    return {**figures, "samples": [float(s) for s in samples]}


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second takes as the first.

    median      of all ratios of a second's sample to a first's
    low, high   95 % of bootstrap draws lie between; equal to `median` for one sample each
    """

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """The ratio of two sets of times, measured apart from each other.

    source  median of pairwise ratios: Hodges and Lehmann 1963, doi:10.1214/aoms/1177704172, on
            logarithms; interval: percentile bootstrap, Efron 1979, doi:10.1214/aos/1176344552
    """
    a, b = _logs(first), _logs(second)
    draws = np.random.default_rng(SEED)
    resampled = [
        np.median(draws.choice(b, len(b))[:, None] - draws.choice(a, len(a))) for _ in range(DRAWS)
    ]
    return _ratio(float(np.median(b[:, None] - a)), resampled)


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """The ratio of times taken in turn, A B A B: each B against its own A, so that what slows both
    down for a while cancels. Equal lengths."""
    differences = _logs(second) - _logs(first)
    draws = np.random.default_rng(SEED)
    resampled = [np.median(draws.choice(differences, len(differences))) for _ in range(DRAWS)]
    return _ratio(float(np.median(differences)), resampled)


def _logs(samples: Sequence[float]) -> Any:
    assert len(samples) > 0, "a ratio of no samples"
    assert min(samples) > 0, f"a time of {min(samples)} s"
    return np.log(np.asarray(samples, np.float64))


def _ratio(middle: float, resampled: Sequence[Any]) -> Ratio:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Ratio(*(float(np.exp(value)) for value in (middle, low, high)))
