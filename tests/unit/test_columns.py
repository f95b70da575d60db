"""The guidance column: where it is on, per-row scales, and CFG++ against its own update rule."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine import columns, schedule, solvers
from sdengine.engine.errors import RequestError
from sdengine.engine.loop import denoise
from sdengine.engine.schedule import Training

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)


def table(name="euler", steps=8, spacing="karras", **options):
    return solvers.make(name, schedule.make(spacing, TRAINING, steps), "eps", **options)


def test_interval_is_counted_in_noise_levels():
    levels = schedule.from_sigmas(TRAINING, [10, 5, 2, 1, 0.3, 0.1, 0])
    made = solvers.make("euler", levels, "eps")
    found = columns.guided_between(made, 7.5, 0.3, 5.0)
    assert found.guidance.tolist() == [1, 7.5, 7.5, 7.5, 1, 1]  # above 0.3, up to 5
    np.testing.assert_array_equal(found.b, made.b)


def test_interval_reaches_the_rows_between_levels():
    """Heun's second row lies at the next level, DPM2's between two: each row by its own."""
    found = columns.guided_between(table("dpm2"), 5.0, 0.5, 3.0)
    ratios = found.sigmas[:-1] / found.alphas[:-1]
    np.testing.assert_array_equal(found.guidance == 5.0, (ratios > 0.5) & (ratios <= 3.0))
    assert 0 < (found.guidance == 5.0).sum() < len(found)


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (5.0, 1.0), (-1.0, 2.0), (np.nan, 1.0)])
def test_interval_must_rise(low, high):
    with pytest.raises(RequestError) as caught:
        columns.guided_between(table(), 7.5, low, high)
    assert "must rise" in caught.value.message
    assert "low then high" in caught.value.hint


def test_one_scale_a_row():
    scales = [1.0, 2.0, 0.0, -1.0, 7.5, 1.0, 1.0, 3.0]
    assert columns.guided_by(table(), scales).guidance.tolist() == scales
    with pytest.raises(RequestError) as caught:
        columns.guided_by(table("heun"), scales)
    assert caught.value.message == "8 guidance scales for 15 rows"
    assert "give 15" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        columns.guided_by(table(), [*scales[:-1], float("inf")])
    assert caught.value.message == "guidance scale 8 is inf"
    assert "finite" in caught.value.hint


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("euler_a", 1.0)])
def test_cfg_plus_plus_is_its_own_update(name, eta):
    """Chung et al., algorithm 1, written out: x0 of the guided noise, on with the unguided one."""
    share, rng = 0.6, np.random.default_rng(2)
    made = columns.cfg_plus_plus(table(name, eta=eta), share)
    x = rng.standard_normal((1, 1, 2, 3))

    def halves(x):
        return np.tanh(x), np.sin(2 * x) / 2

    def predict(x, row):
        uncond, cond = halves(x)
        return uncond + row.guidance * (cond - uncond)

    noises = rng.standard_normal((8, *x.shape))
    draws = iter(noises)
    for step in denoise(made, predict, x, lambda: next(draws)):
        i = step.row.index
        a, s, a1, s1 = made.alphas[i], made.sigmas[i], made.alphas[i + 1], made.sigmas[i + 1]
        uncond, cond = halves(step.before)
        x0 = (step.before - s * (uncond + share * (cond - uncond))) / a
        spread = eta * s1 / s * np.sqrt(1 - a**2 / a1**2)
        expected = a1 * x0 + np.sqrt(s1**2 - spread**2) * uncond + spread * noises[i]
        np.testing.assert_allclose(step.x, expected, rtol=0, atol=1e-12)
    assert i == 7


def test_cfg_plus_plus_refuses_what_it_cannot_be():
    for name in ("dpmpp_2m", "heun", "lcm"):
        with pytest.raises(RequestError) as caught:
            columns.cfg_plus_plus(table(name), 0.6)
        assert "first order" in caught.value.message
        assert "ddim" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        columns.cfg_plus_plus(table(), 7.5)
    assert "never goes past 1" in caught.value.message
    assert "0.6" in caught.value.hint
