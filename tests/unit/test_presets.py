"""Columns, costs and what is refused: every expectation is counted by hand or from the papers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdengine.engine import presets, schedule, solvers
from sdengine.engine.errors import RequestError
from sdengine.engine.presets import (
    PRESETS,
    check_start,
    checked,
    cost,
    costs_of,
    quadratic_rows,
    sources,
    with_cache,
    with_guidance,
)
from sdengine.engine.schedule import Training
from sdengine.engine.spec import Component, ComponentSpec, Graph

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
COSTS = {"full": 1.0, "deep": 1.0, "shallow0": 0.25, "shallow1": 0.5}


def table(steps=10, sampler="ddim", spacing="leading"):
    return solvers.make(sampler, schedule.make(spacing, TRAINING, steps), "v")


def deep_rows(found):
    return [i for i, name in enumerate(found.graphs) if name == "deep"]


@pytest.mark.parametrize(
    ("interval", "rows"), [(2, [0, 2, 4, 6, 8]), (3, [0, 3, 6, 9]), (9, [0, 9]), (10, [0])]
)
def test_a_uniform_interval(interval, rows):
    found = with_cache(table().guided(5.0), interval, cut=1)
    assert deep_rows(found) == rows
    assert {g for g in found.graphs if g != "deep"} == {"shallow1"}
    assert found.t is not None
    for column in ("t", "px", "po", "a", "b", "n", "guidance"):
        np.testing.assert_array_equal(
            getattr(found, column), getattr(table().guided(5.0), column), err_msg=column
        )


def test_chosen_rows_and_no_cache():
    assert deep_rows(with_cache(table(), [0, 1, 5])) == [0, 1, 5]
    assert with_cache(table(), [0, 1, 5]).graphs[2] == f"shallow{presets.CUT}"
    assert with_cache(table(), 1).graphs == ("full",) * 10
    assert with_cache(table(), list(range(10))).graphs == ("full",) * 10


def test_a_row_where_guidance_sets_in_runs_deep():
    """Rows 0-2 and 8-9 lie outside of the interval: the features of one half would not do."""
    plain = table()
    level = plain.sigmas[:-1] / plain.alphas[:-1]
    guided = with_guidance(plain, 5.0, (0.99 * level[7], level[3]))
    assert list(np.flatnonzero(guided.guidance == 5.0)) == [3, 4, 5, 6, 7]
    assert set(guided.guidance) == {1.0, 5.0}
    assert deep_rows(with_cache(guided, 5)) == [0, 3, 5]
    assert deep_rows(with_cache(guided, 10)) == [0, 3]


def test_cost_is_counted_by_graph_and_half():
    plain = table()
    assert cost(plain.guided(5.0), COSTS) == 10.0
    assert cost(plain, COSTS) == 5.0, "one half in every row"
    assert cost(with_cache(plain.guided(5.0), 2, cut=1), COSTS) == 5 + 5 * 0.5
    level = plain.sigmas[:-1] / plain.alphas[:-1]
    guided = with_guidance(plain, 5.0, (0.99 * level[7], level[3]))
    # deep rows 0 (half), 3, 5 (both); shallow rows 1 2 8 9 (half), 4 6 7 (both)
    assert cost(with_cache(guided, 5, cut=0), COSTS) == 0.5 + 2 + 0.25 * (4 * 0.5 + 3)


def test_costs_are_those_that_the_bundle_states():
    macs = {"prologue": None, "full": 400, "deep": 400, "shallow0": 60}
    graphs = {n: Graph(n, Path(n), "", (), (), m) for n, m in macs.items()}
    unet = Component(ComponentSpec("unet", (), ()), graphs, Path("w"), "", {}, "")
    assert costs_of(unet) == {"full": 1.0, "deep": 1.0, "shallow0": 0.15}
    old = replace(unet, graphs={"full": replace(graphs["full"], macs=None)})
    assert costs_of(old) == {"full": 1.0}


@pytest.mark.parametrize(
    ("rows", "deep", "centre", "power"),
    [(50, 10, 15, 1.4), (20, 10, 5, 1.4), (20, 5, 0, 2.0), (50, 25, 20, 1.2), (7, 7, 3, 1.5)],
)
def test_quadratic_rows(rows, deep, centre, power):
    """floor(l^p + c): rows by that formula, densest at the centre, where the power allows it."""
    found = quadratic_rows(rows, deep, centre, power)
    assert len(found) == deep == len(set(found))
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] < rows
    gaps = np.diff([*found, rows])
    near = int(np.argmin(np.abs(np.array(found) - centre)))
    assert gaps[near] <= gaps[-1]
    if deep < rows:
        assert gaps[-1] >= rows / deep, "and thinner at the end than a uniform interval is"


def test_quadratic_rows_in_numbers():
    """By hand: 4 of 16 rows around 0 with power 2: (0, 1, 2, 3)^2."""
    assert quadratic_rows(16, 4, 0, 2.0) == [0, 1, 4, 9]
    assert quadratic_rows(12, 4, 5, 1.0) == [0, 3, 6, 9]


def test_sources():
    found = replace(table(5), graphs=("deep", "shallow0", "full", "shallow0", "deep"))
    assert sources(found) == [None, 0, None, 0, None]


REFUSED = {
    "interval 0": (lambda t: with_cache(t, 0), "cache interval is 0", "1 (no cache)"),
    "no row 0": (lambda t: with_cache(t, [1, 3]), "run deep are 1, 3", "the first one 0"),
    "not ascending": (lambda t: with_cache(t, [0, 3, 2]), "are 0, 3, 2", "0 to 9, ascending"),
    "twice": (lambda t: with_cache(t, [0, 3, 3]), "are 0, 3, 3", "ascending"),
    "beyond": (lambda t: with_cache(t, [0, 10]), "are 0, 10", "0 to 9"),
    "none": (lambda t: with_cache(t, []), "are none", "the first one 0"),
    "cut": (lambda t: with_cache(t, 2, cut=-1), "cut is -1", "0 or more"),
    "empty": (lambda t: with_guidance(t, 5, (3, 1)), "from 3 to 1", "low then high"),
    "negative": (lambda t: with_guidance(t, 5, (-1, 1)), "from -1 to 1", "low then high"),
    "rows": (lambda t: quadratic_rows(5, 6, 1), "6 of 5 rows", "at most as many"),
    "centre": (lambda t: quadratic_rows(5, 2, 5), "around row 5", "a centre within it"),
    "power": (lambda t: quadratic_rows(5, 2, 1, 0.5), "power 0.5", "1 or more"),
    "first shallow": (
        lambda t: checked(replace(t, graphs=("shallow0",) * 10)),
        "row 0 runs shallow0, but no deep row comes before it",
        "let the first row run `deep`",
    ),
    "behind full": (
        lambda t: checked(replace(t, graphs=("full",) + ("shallow0",) * 9)),
        "row 1 runs shallow0, but no deep row",
        "first row",
    ),
    "precision": (
        lambda t: checked(replace(t, graphs=("deep@bf16",) + ("shallow0",) * 9)),
        "row 1 runs shallow0, but the features it takes are of row 0, which runs deep@bf16",
        "in one precision",
    ),
    "halves": (
        lambda t: with_guidance(with_cache(t, 10), 5.0, (0.01, 5)),
        "it is guided, and row 0, whose features it takes, is not",
        "write the guidance before the cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused(case):
    make, message, hint = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        make(table())
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_where_a_run_can_be_resumed():
    found = with_cache(table().guided(5.0), [0, 4, 8])
    for row in (0, 4, 8):
        check_start(found, row)
    with pytest.raises(RequestError, match="row 5 takes the features of row 4") as caught:
        check_start(found, 5)
    assert "resume at row 4, or behind it at row 8" in caught.value.hint
    with pytest.raises(RequestError, match="cannot be resumed at row 9") as caught:
        check_start(found, 9)
    assert caught.value.hint.startswith("resume at row 8; ")
    late = replace(found, graphs=("deep", "full", "shallow0", *found.graphs[3:]))
    with pytest.raises(RequestError, match="row 2 takes the features of row 0"):
        check_start(late, 1)
    check_start(table(), 7)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_write_columns_that_can_run(name):
    preset = PRESETS[name]
    sampler = "ddim" if name == "turbo" else preset.sampler  # its own is for distilled models
    spacing = schedule_of(preset, sampler)
    plain = solvers.make(sampler, schedule.make(spacing, TRAINING, preset.steps), "v")
    for scale in (1.0, 5.0):
        found = preset.columns(plain, scale)
        assert checked(found) is found
        assert found.graphs[0] in ("full", "deep")
        assert {scale} <= set(found.guidance) <= {1.0, scale}


def schedule_of(preset, sampler):
    return solvers.find(sampler).schedule if preset.schedule is None else preset.schedule


def test_the_quick_presets_are_as_cheap_as_promised():
    """In shares of 20 full steps, with shallow rows at their cost in the embedded model."""
    costs = {"full": 1.0, "deep": 1.0, "shallow0": 0.144, "shallow1": 0.412, "shallow2": 0.691}
    for name, most in (("balanced", 0.5), ("fast", 0.35)):
        preset = PRESETS[name]
        plain = table(preset.steps, preset.sampler, schedule_of(preset, preset.sampler))
        assert cost(preset.columns(plain, 5.0), costs) <= most * 20
