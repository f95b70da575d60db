"""Ratios and summaries against closed forms and known samples."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.bench import stats


def test_summary_of_known_samples():
    """0 to 100: each percentile is its own number."""
    found = stats.summary([float(n) for n in range(101)])
    assert (found["median"], found["p10"], found["p90"], found["n"]) == (50.0, 10.0, 90.0, 101)
    assert stats.summary([]) == {}


def test_the_ratio_of_exact_multiples_is_exact():
    times = [1.0, 1.1, 0.9, 1.3]
    found = stats.paired_ratio(times, [3 * t for t in times])
    assert (found.median, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_the_interval_holds_the_true_ratio_nearly_always(rng):
    """Log-normal times, 2 apart: 95 % intervals miss it in about one of twenty draws."""
    held = 0
    for _ in range(24):
        a, b = (np.exp(rng.normal(m, 0.1, 15)) for m in (0.0, np.log(2)))
        found = stats.ratio(list(a), list(b))
        held += found.low <= 2 <= found.high
    assert held >= 20


def test_taking_turns_cancels_what_slows_both(rng):
    """The machine slows down tenfold meanwhile; the pairs do not see it, the sets do."""
    drift = np.exp(np.linspace(0, np.log(10), 20))
    a, b = drift, 1.5 * drift * np.exp(rng.normal(0, 0.01, 20))
    paired, apart = stats.paired_ratio(list(a), list(b)), stats.ratio(list(a), list(b))
    assert paired.high - paired.low < 0.05
    assert paired.median == pytest.approx(1.5, rel=0.02)
    assert apart.high - apart.low > 0.5


def test_a_ratio_of_nothing_is_our_mistake():
    with pytest.raises(AssertionError, match="no samples"):
        stats.ratio([], [1.0])
    with pytest.raises(AssertionError, match=r"time of 0\.0"):
        stats.ratio([0.0], [1.0])
