"""Schedules against the reference's own numbers (golden case `schedules`)."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.errors import RequestError
from sdengine.engine.schedule import Training


def training(case, name):
    betas = case["beta_schedules"][name]
    return Training.scaled_linear(betas["linear_start"], betas["linear_end"], betas["timesteps"])


@pytest.mark.parametrize("name", ["sd", "x4"])
def test_alphas_cumprod_are_the_stored_float32_values(golden, name):
    case, _ = golden("schedules")
    stored = np.array(case["beta_schedules"][name]["alphas_cumprod_float32"], np.float32)
    np.testing.assert_array_equal(training(case, name).alphas_cumprod.astype(np.float32), stored)


def test_reference_time_lists(golden):
    """All counts from 1 to 100: the same list, or refused where the reference fails."""
    case, _ = golden("schedules")
    assert len(case["ddim"]) == 100
    for steps, expected in case["ddim"].items():
        if "fails" in expected:
            with pytest.raises(RequestError):
                schedule.make("reference", training(case, "sd"), int(steps))
            continue
        made = schedule.make("reference", training(case, "sd"), int(steps))
        assert made.timesteps.tolist() == expected["timesteps"][::-1]


def test_ddim_coefficients(golden):
    """a_t, a_prev and sigma of the reference, read off our table's levels and noise column."""
    case, _ = golden("schedules")
    for expected in case["ddim_parameters"]:
        levels = schedule.make("reference", training(case, expected["betas"]), expected["S"])
        table = solvers.make("ddim", levels, "eps", eta=expected["eta"])
        for ours, theirs in (
            (table.alphas[:-1] ** 2, expected["alphas"]),
            (table.alphas[1:] ** 2, expected["alphas_prev"]),
            (table.n, expected["sigmas"]),
            (table.sigmas[:-1], expected["sqrt_one_minus_alphas"]),
        ):
            np.testing.assert_allclose(ours, theirs[::-1], rtol=2e-6, atol=1e-9)


def test_dpm_levels_and_times(golden):
    case, _ = golden("schedules")
    for expected in case["dpm"]:
        levels = schedule.make("uniform", training(case, expected["betas"]), expected["S"])
        times = np.append(levels.timesteps, 0.0)
        np.testing.assert_allclose(times, expected["network_time"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.log(levels.alphas), expected["log_alpha"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(levels.sigmas, expected["sigma"], rtol=2e-5, atol=0)
        np.testing.assert_allclose(levels.lambdas, expected["lambda"], rtol=0, atol=3e-5)
