"""Names of other tools lead to ours; what is not here is refused with the nearest, or a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.errors import RequestError, UnknownName
from sdengine.engine.schedule import Training
from sdengine.engine.solvers import names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("DPM++ SDE Karras", ("dpmpp_sde", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Heun Karras", ("dpmpp_2m_sde_heun", "karras")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_a", "karras")),
        ("DPM++ 3M SDE", ("dpmpp_3m_sde", None)),
        ("Euler a", ("euler_a", None)),
        ("Euler", ("euler", None)),
        ("LMS Karras", ("lms", "karras")),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("Heun", ("heun", None)),
        ("UniPC", ("unipc_3_bh1", None)),
        ("PLMS", ("plms", None)),
        ("Restart", ("restart", None)),
        ("DPM++ 2M SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("Euler Align Your Steps", ("euler", "align_your_steps")),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("uni_pc_bh2", ("unipc_3", None)),
        ("euler_ancestral", ("euler_a", None)),
        ("k_euler_ancestral", ("euler_a", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("PNDMScheduler", ("plms", None)),
        ("LCMScheduler", ("lcm", None)),
    ],
)
def test_names_of_other_tools(name, expected):
    assert solvers.resolve(name) == expected


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_own_names_and_titles_lead_to_themselves(name):
    assert solvers.resolve(name) == (name, None)
    assert solvers.resolve(solvers.find(name).title) == (name, None)


def test_every_alias_and_schedule_exists():
    assert set(names.ALIASES) <= set(solvers.SOLVERS)
    assert set(names.SUFFIXES.values()) <= set(schedule.SCHEDULES)
    assert {s.schedule for s in solvers.SOLVERS.values()} <= set(schedule.SCHEDULES)
    given = [names.plain(alias) for many in names.ALIASES.values() for alias in many]
    assert len(given) == len(set(given))


def test_unknown_and_impossible_names():
    with pytest.raises(UnknownName) as caught:
        solvers.resolve("dpmpp_2n")
    assert "or 'dpmpp_2m'" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        solvers.resolve("DPM adaptive")
    assert "chooses its steps" in caught.value.message
    assert "docs/samplers.md" in caught.value.hint


def test_options_that_do_not_apply():
    training = Training.scaled_linear(0.00085, 0.012, 1000)
    levels = schedule.make("karras", training, 4)
    with pytest.raises(RequestError) as caught:
        solvers.make("heun", levels, "v", s_noise=1.1)
    assert "takes no s_noise (got 1.1)" in caught.value.message
    assert "dpmpp_2m_sde" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        solvers.make("heun", levels, "v", eta=0.3)
    assert "takes no eta (got 0.3)" in caught.value.message
    assert "euler_a" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        solvers.make("heun", schedule.make("karras", training.zero_snr(), 4), "eps")
    assert "an eps model cannot start" in caught.value.message
    assert "v models" in caught.value.hint
    assert len(solvers.make("heun", schedule.make("karras", training.zero_snr(), 4), "v")) == 7


def test_the_page_lists_every_name():
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text("utf-8")
    for name in (*solvers.SOLVERS, *schedule.SCHEDULES):
        assert f"`{name}`" in page, name
