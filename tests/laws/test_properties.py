"""Any schedule, sampler, step count and strength: finite tables that end where they should."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine.engine import schedule, solvers
from sdengine.engine.errors import RequestError
from sdengine.engine.loop import denoise

from .laws import PREDICTIONS, TRAINING

REFUSED = {3, 9, 27, 36, 37}  # by the reference spacing, as the reference fails there


def made_or_hint(make, *args):
    """(what it makes, "") or (None, the hint of its refusal)."""
    try:
        return make(*args), ""
    except RequestError as error:
        return None, error.hint


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(solvers.SOLVERS)),
    spacing=st.sampled_from(sorted(schedule.SCHEDULES)),
    steps=st.integers(1, 60),
    strength=st.floats(0.01, 1.0),
    prediction=st.sampled_from(PREDICTIONS),
    above=st.booleans(),
    eta=st.sampled_from([None, 0.0, 0.37, 1.0]),
)
def test_every_table(name, spacing, steps, strength, prediction, above, eta):
    levels, hint = made_or_hint(schedule.make, spacing, TRAINING, steps)
    assert (levels is None) == (spacing == "reference" and steps in REFUSED)
    if levels is None:
        assert "leading" in hint
        return
    calls = max(1, min(len(levels), int(strength * len(levels))))
    tail = levels.tail(calls, above=above)
    solver = solvers.find(name)
    table = solvers.make(name, tail, prediction, eta=eta if solver.eta else None)
    columns = ("t", "px", "po", "a", "b", "n", "alphas", "sigmas", "intervals", "guidance")
    assert all(np.isfinite(getattr(table, column)).all() for column in columns)
    assert (table.n >= 0).all()
    assert table.sigmas[-1] / table.alphas[-1] == tail.ratios[-1] or math.isclose(
        table.sigmas[-1], levels.sigmas[-1], rel_tol=1e-12
    )
    assert math.isclose(table.sigmas[0], tail.sigmas[0], rel_tol=1e-12)
    np.testing.assert_allclose(table.alphas**2 + table.sigmas**2, 1.0, rtol=1e-12)
    assert (table.t >= 0).all()
    assert (table.t <= TRAINING.timesteps - 1).all()
    assert calls <= len(table) <= 3 * solver.calls * calls + 1
    assert (table.start_noise, table.start_scale) == (tail.start_noise, tail.start_scale)
    # it runs in float32 on a network that answers zeros, and nothing overflows
    *_, last = denoise(
        table, lambda x, _: np.zeros_like(x), np.ones(3, np.float32), lambda: np.ones(3, np.float32)
    )
    assert last.x.dtype == np.float32
    assert np.isfinite(last.x).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-1.0, 20.0), max_size=8))
def test_explicit_lists_are_used_as_they_are_or_refused(values):
    """Whatever the numbers: a schedule of exactly these, or an error that says what to do."""
    for make, end in ((schedule.from_sigmas, []), (schedule.from_timesteps, [0.0])):
        made, hint = made_or_hint(make, TRAINING, values)
        if made is None:
            assert hint
            continue
        given_back = made.ratios.tolist() if not end else [*made.timesteps.tolist(), 0.0]
        np.testing.assert_allclose(given_back, values + end, rtol=1e-12, atol=0)
        assert np.isfinite(solvers.make("unipc_3", made, "v").weights()).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps=st.integers(-5, 2000), spacing=st.sampled_from(sorted(schedule.SCHEDULES)))
def test_step_counts_outside_are_refused(steps, spacing):
    made, hint = made_or_hint(schedule.make, spacing, TRAINING, steps)
    if made is None:
        assert not 1 <= steps <= 1000 or spacing == "reference"
        assert "--s" in hint
        return
    assert 1 <= steps <= 1000
    assert 1 <= len(made)
    assert (np.diff(made.sigmas) < 0).all()
    assert (np.diff(made.alphas) > 0).all()
