"""The search's own parts: the front, the walk, the file. No picture is drawn."""

from __future__ import annotations

import json

import pytest

from sdengine.bench.presets_search import (
    Found,
    front,
    one_away,
    promising,
    prompts_of,
    read,
    settings,
)
from sdengine.engine.errors import RequestError
from sdengine.engine.presets import Preset


def found(cost, *psnr_db, steps=10, **knobs):
    return Found(Preset("f32", steps, "ddim", **knobs), cost, psnr_db)


def test_the_front():
    a, b, c = found(2, 20, 22, 21), found(4, 25, 30, 26), found(8, 31)
    beaten = [found(4, 24), found(5, 26), found(9, 30.9)]
    assert front([*beaten, c, a, b]) == [a, b, c]
    assert front([]) == []


def test_what_is_promising_comes_in_order_of_its_distance_to_the_front():
    a, b = found(2, 20.0), found(6, 30.0)
    near, far = found(4, 19.5), found(7, 28.0)
    assert promising([far, near, b, a]) == [b, a, near]


def test_one_away():
    others = {(s, n): None for s in ("ddim", "plms") for n in (5, 10, 20)}
    del others["ddim", 10]
    near = one_away(("ddim", 10), others)
    assert sorted(near) == [("ddim", 5), ("ddim", 20), ("plms", 10)]


def test_a_line_is_read_as_it_was_written(tmp_path):
    made = [
        found(2.5, 20.25, 21.5, cache=(0, 3, 5), cut=2, interval=(0.2, 6.0)),
        found(3.0, 22.0),
    ]
    file = tmp_path / "found.jsonl"
    lines = [json.dumps(f.line()) for f in made]
    file.write_text("\n".join([*lines, '{"cut short']) + "\n")
    assert read(file) == made
    assert json.loads(lines[0])["median"] == 20.88
    assert read(tmp_path / "none.jsonl") == []


def test_knobs_of_another_version_are_refused(tmp_path):
    line = found(2.5, 20.25).line()
    line["preset"]["speed"] = 11
    with pytest.raises(RequestError, match="knobs that presets have not: speed") as caught:
        Found.read(line)
    assert "--out" in caught.value.hint


def test_prompts_are_the_first_phrases(tmp_path):
    file = tmp_path / "subjects.txt"
    file.write_text("# a comment\n😀 a grinning face; a happy face\n\na fox; foxes\n", "utf-8")
    assert prompts_of(file, 9) == ["a grinning face", "a fox"]
    assert prompts_of(file, 1) == ["a grinning face"]


def test_every_combination_of_knobs_stands_once():
    todo = settings({"full": 1.0, "deep": 1.0, "shallow0": 0.1, "shallow2": 0.7}, ["ddim", "plms"])
    assert len(todo) == len(set(todo)) > 1000
    assert {k[0] for k in todo} == {"ddim", "plms"}
    assert {k[4] for k in todo} == {0, 2}
    assert all(k[4] == 0 for k in todo if k[3] == 1)  # without a cache the cut says nothing
    assert {k[3] for k in settings({"full": 1.0}, ["ddim"])} == {1}  # no shallow graph, no cache
