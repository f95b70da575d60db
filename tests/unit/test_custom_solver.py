"""A solver from a JSON file: it runs as the built-in one does, and every mistake in it is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.errors import RequestError
from sdengine.engine.schedule import Training
from sdengine.engine.solvers import custom

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
SIGMAS = [14.6, 3.0, 0.7, 0.0]


def euler():
    """Three rows of Euler, written by hand."""
    return {
        "format": custom.FORMAT,
        "name": "by hand",
        "quantity": "noise",
        "sigmas": SIGMAS,
        "x": [[1], [1], [1]],
        "m": [[3.0 - 14.6], [0.7 - 3.0], [-0.7]],
    }


def euler_2():
    """Two values of history and noise in the second row: 0.7 = hypot(0.42, 0.56)."""
    content = euler()
    content["m"] = [[3.0 - 14.6], [1.5 * -2.58, -0.5 * -2.58], [-0.7]]
    content["noise"] = [0, 0.56, 0]
    return content


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_is_the_table_of_the_built_in_one(tmp_path, prediction):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(euler()))
    made = custom.load(file)
    found = made.table(TRAINING, prediction)
    levels = schedule.from_sigmas(TRAINING, SIGMAS)
    expected = solvers.make("euler", levels, prediction)
    for name in ("t", "px", "po", "a", "b", "n", "alphas", "sigmas"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    assert found.start_noise == expected.start_noise
    assert made.name == "by hand"


def test_history_noise_and_timesteps():
    table = custom.parse({**euler_2(), "timesteps": [999, 600.5, 1]}, "x").table(TRAINING, "eps")
    assert table.depth == 2
    assert table.t.tolist() == [999, 600.5, 1]
    assert table.n[1] == pytest.approx(0.56 * table.alphas[2])


def without(key):
    content = euler()
    del content[key]
    return content


WRONG = [
    ([], '"format"'),
    ({**euler(), "format": 7}, '"format"'),
    ({**euler(), "sigma": []}, "unknown entry 'sigma'"),
    ({**euler(), "quantity": "v"}, "quantity 'v'"),
    (without("sigmas"), "list of finite numbers 'sigmas'"),
    ({**euler(), "sigmas": [14.6, 3.0, "0.7", 0]}, "list of finite numbers 'sigmas'"),
    ({**euler(), "sigmas": [14.6, 3.0, float("nan"), 0]}, "list of finite numbers 'sigmas'"),
    ({**euler(), "sigmas": [14.6, 3.0, 10**400, 0]}, "list of finite numbers 'sigmas'"),
    ({**euler(), "sigmas": [14.6, 3.0, 0.0, 0.0]}, "at least two levels above 0"),
    ({**euler(), "sigmas": [1.0], "x": [], "m": []}, "at least two levels above 0"),
    ({**euler(), "timesteps": [999, 1]}, "2 numbers in 'timesteps'; 3 rows"),
    ({**euler(), "noise": [0, 0, True]}, "list of finite numbers 'noise'"),
    ({**euler(), "x": [[1], [1]]}, "no list 'x' of 3 rows"),
    ({**euler(), "x": [[1], [1], [0] * 6]}, "row 2 of 'x'"),
    ({**euler(), "m": [[-11.6], [-2.3, 0, 1.0], [-0.7]]}, "back before its first row: m of row 1"),
    ({**euler(), "m": [[-11.6], [-2.29], [-0.7]]}, "row 1: its noise weighs 0.71, not 0.7"),
    ({**euler(), "x": [[1], [1.0001], [1]]}, "row 1: its picture weighs 1.0001, not 1"),
    ({**euler(), "m": [[-11.6 - 6.0], [2.3], [-0.7]]}, "row 0: its noise weighs -3, not 3"),
    ({**euler_2(), "noise": [0, 0.6, 0]}, "row 1: its noise weighs"),
    ({**euler(), "sigmas": [1.0, 3.0, 2.0, 1.0]}, "ends at level 1, no lower than it began"),
]


@pytest.mark.parametrize(("content", "says"), WRONG)
def test_what_is_wrong_is_named(content, says):
    with pytest.raises(RequestError) as caught:
        custom.parse(content, "x")
    assert says in caught.value.message
    assert "docs/samplers.md" in caught.value.hint


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError) as caught:
        custom.load(tmp_path / "none.json")
    assert "No such file" in caught.value.message
    assert "JSON" in caught.value.hint
    (tmp_path / "torn.json").write_text('{"format":')
    with pytest.raises(RequestError) as caught:
        custom.load(tmp_path / "torn.json")
    assert "is not JSON" in caught.value.message
    assert "docs/samplers.md" in caught.value.hint
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not JSON"):
        custom.load(tmp_path / "bytes.json")


def test_levels_of_another_model():
    content = {**euler(), "sigmas": [80.0, 3.0, 0.7, 0.0], "m": [[-77.0], [-2.3], [-0.7]]}
    made = custom.parse(content, "x")
    with pytest.raises(RequestError) as caught:
        made.table(TRAINING, "v")
    assert "0.7 to 80; this model knows 0.02888 to 14.76" in caught.value.message
    assert "other training levels" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", "unipc_3", "lms", "dpmpp_2m_sde", "dpmpp_sde", "restart"]
)
def test_built_in_tables_pass_when_written_out(name):
    """What the library makes itself is a legal file: weights back in sigma / alpha."""
    levels = schedule.make("karras", TRAINING, 7)
    table = solvers.make(name, levels, "v")
    rows, alphas = len(table), table.alphas
    x = [[table.a[i, k] * alphas[i - k] / alphas[i + 1] for k in range(min(i + 1, 5))]
         for i in range(rows)]  # fmt: skip
    m = [(table.b[i] / alphas[i + 1]).tolist() for i in range(rows)]
    content = {
        "format": custom.FORMAT, "quantity": table.quantity, "x": x, "m": m,
        "sigmas": (table.sigmas / alphas).tolist(), "timesteps": table.t.tolist(),
        "noise": (table.n / alphas[1:]).tolist(),
    }  # fmt: skip
    again = custom.parse(json.loads(json.dumps(content)), name).table(TRAINING, "v")
    np.testing.assert_allclose(again.weights(), table.weights(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(again.n, table.n, rtol=0, atol=1e-12)
