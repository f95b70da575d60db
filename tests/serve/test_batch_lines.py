"""What a file of requests is read as, what is refused, and how its pictures are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError, StorageError
from sdengine.serve import lines, plan

Write = Callable[..., Path]


def planned(path: Path, **options: Any) -> list[plan.Item]:
    return plan.items(lines.read(path).good, "model", options.pop("how", {}), **options)


def names(path: Path, **options: Any) -> list[str]:
    return [item.name for item in planned(path, **options)]


def save_picture(path: Path, shade: int = 128) -> Path:
    Image.fromarray(np.full((64, 128, 3), shade, np.uint8)).save(path)
    return path


def test_objects_and_texts_are_requests_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "fox", "steps": 3}\r\n\n  \n"a \\u00e9 panda"\n{"seed": 0}'
    )
    found = lines.read(path)
    assert found.bad == []
    assert [line.number for line in found.good] == [1, 4, 5]
    assert [line.request.prompt for line in found.good] == ["fox", "a é panda", ""]
    assert found.good[0].request.steps == 3
    assert found.good[2].request.seed == 0


def test_common_fields_hold_where_a_line_says_nothing(write_lines: Write) -> None:
    path = write_lines("fox", {"prompt": "panda", "steps": 9}, {"steps": None})
    found = lines.read(path, {"steps": 4, "width": 64})
    assert [line.request.steps for line in found.good] == [4, 9, None]
    assert [line.request.width for line in found.good] == [64, 64, 64]


def test_pictures_lie_beside_the_file(write_lines: Write, tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png")
    path = write_lines(
        {"image": "a.png", "mask": "b.png", "depth": None},
        {"image": ["a.png", str(tmp_path / "b.png")]},
    )
    one, two = lines.read(path).good
    assert one.pictures == {"image": [str(tmp_path / "a.png")], "mask": str(tmp_path / "b.png")}
    assert two.pictures == {"image": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]}


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        (b'{"promt": "x"}', "unknown request field 'promt'", "did you mean 'prompt'"),
        (b'{"prompt": "x"', "not JSON", '{"prompt": "a red fox"'),
        (b'{"steps": 3, "steps": 4}', "twice", '{"prompt": "a red fox"'),
        (b"[1, 2]", "no object and no text", '{"prompt": "a red fox"'),
        (b"NaN", "not JSON", '{"prompt": "a red fox"'),
        (b"\xff\xfe", "not JSON", '{"prompt": "a red fox"'),
        (b'{"steps": 0}', "steps is 0", "in that range"),
        (b'{"sampler": "dmpp"}', "unknown sampler 'dmpp'", "dpmpp_2m"),
        (b'{"image": "gone.png"}', "there is no image", "relative to the file"),
        (b'{"image": 3}', "image is 3, not a path", "give image as a path"),
        (b'{"image": []}', "image is [], not a path", "give image as a path"),
        (b'{"mask": ["a.png"]}', "not a path", "give mask as a path"),
        (b'{"solver": "gone.json"}', "gone.json", ""),
    ],
)
def test_a_bad_line_is_known_by_its_number(
    tmp_path: Path, fake_bundle: Path, raw: bytes, message: str, hint: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'"fox"\n\n' + raw + b"\n")
    found = lines.read(path, None, plan.Checker(open_bundle(fake_bundle)))
    assert [line.number for line in found.good] == [1]
    (bad,) = found.bad
    assert bad.number == 3
    assert message in bad.error.message
    assert hint in bad.error.hint
    assert bad.text().startswith("line 3: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "upscale"}, "it cannot do upscale"),
        ({"strength": 0.5}, "txt2img takes no strength"),
        ({"image": "a.png", "width": 16, "cache": 2, "cut": 9}, "shallow9"),
        ({"weights": [1.0]}, "takes no weights"),
        ({"guidance_scales": [1.0, 2.0], "steps": 5}, "guidance"),
    ],
)
def test_what_the_model_cannot_run_is_refused_before_a_network_runs(
    write_lines: Write, tmp_path: Path, fake_bundle: Path, fields: dict[str, Any], message: str
) -> None:
    save_picture(tmp_path / "a.png")
    found = lines.read(
        write_lines("fox", fields, "panda"), None, plan.Checker(open_bundle(fake_bundle))
    )
    assert [line.number for line in found.good] == [1, 3]
    assert message in found.bad[0].error.message


def test_all_bad_lines_are_said_at_once(write_lines: Write) -> None:
    path = write_lines(*[{"steps": -k} for k in range(14)], "fox")
    error = lines.refuse(path, lines.read(path).bad)
    assert "14 lines of" in error.message
    assert "line 10: " in error.message
    assert "line 11: " not in error.message
    assert "and 4 more" in error.message
    assert "--keep-going" in error.hint


def test_a_file_of_nothing_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(RequestError, match="holds no request") as caught:
        lines.read(tmp_path / "empty.jsonl")
    assert '{"prompt"' in caught.value.hint
    with pytest.raises(StorageError, match="cannot read") as gone:
        lines.read(tmp_path / "none.jsonl")
    assert "check the path" in gone.value.hint


@pytest.mark.parametrize("text", ["steps=3", "[1]", '"x"'])
def test_common_fields_are_an_object(text: str) -> None:
    with pytest.raises(RequestError, match="--common") as caught:
        lines.common_fields(text)
    assert "--common '{" in caught.value.hint


def test_names_stay_when_lines_move(write_lines: Write) -> None:
    before = names(write_lines("fox", "panda", {"prompt": "bear", "seed": 5}))
    after = names(write_lines({"prompt": "bear", "seed": 5}, "new", "panda", "fox"))
    assert set(before) < set(after)
    assert len(after) == 4


def test_lines_without_a_seed_differ_though_they_say_the_same(write_lines: Write) -> None:
    found = planned(write_lines("fox", "fox", "fox"))
    assert len({item.name for item in found}) == 3
    assert len({item.request.seed for item in found}) == 3


def test_a_picture_that_two_lines_ask_for_is_one(write_lines: Write) -> None:
    path = write_lines(
        {"prompt": "fox", "seed": 7, "count": 3},
        {"prompt": "fox", "seed": 8},
        {"prompt": "fox", "seed": 7, "batch_size": 4},
    )
    assert [item.request.seed for item in planned(path)] == [7, 8, 9]


def test_all_that_decides_a_picture_decides_its_name(write_lines: Write, tmp_path: Path) -> None:
    base = {"prompt": "fox", "seed": 7}
    path = write_lines(base, {**base, "steps": 9}, {**base, "negative_prompt": "x"})
    found = names(path)
    assert len(set(found)) == 3
    assert set(found).isdisjoint(names(path, how={"precision": "f32"}))
    assert set(found).isdisjoint(names(path, suffix=".jpg"))
    other = plan.items(lines.read(path).good, "another model", {})
    assert set(found).isdisjoint(item.name for item in other)
    pictured = write_lines({**base, "image": "a.png"}, name="q.jsonl")
    save_picture(tmp_path / "a.png", 128)
    once = names(pictured)
    save_picture(tmp_path / "a.png", 129)
    assert names(pictured) != once


def test_runs_are_neighbours_of_one_line(write_lines: Write) -> None:
    path = write_lines(
        {"prompt": "fox", "seed": 1, "count": 7, "batch_size": 2},
        {"prompt": "fox", "seed": 8, "count": 2},
        {"prompt": "fox", "seed": 1, "variation_seed": 50, "count": 3, "variation_strength": 0.1},
    )
    found = planned(path)

    def shown(work: list[plan.Job]) -> list[tuple[int | None, int, int]]:
        return [(j.request.seed, j.request.count, j.request.batch_size) for j in work]

    assert shown(plan.jobs(found)) == [(1, 7, 2), (8, 2, 1), (1, 3, 1)]
    assert plan.jobs(found)[2].request.variation_seed == 50
    holes = {found[2].name, found[3].name, found[7].name}
    assert shown(plan.jobs(found, holes)) == [(1, 2, 2), (5, 3, 2), (9, 1, 1), (1, 3, 1)]
    most = plan.jobs(found, (), 2)
    assert [j.request.count for j in most] == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert [item.name for job in most for item in job.items] == [item.name for item in found]


def test_lines_that_differ_in_words_and_seeds_share_a_call(
    write_lines: Write, tmp_path: Path
) -> None:
    save_picture(tmp_path / "a.png")
    path = write_lines(
        {"prompt": "a", "steps": 3},
        {"prompt": "b", "steps": 4},
        {"prompt": "c", "steps": 3, "negative_prompt": "x", "count": 2},
        {"prompt": "d", "steps": 3, "image": "a.png"},
        {"prompt": "e", "steps": 4},
        {"prompt": "f", "steps": 3, "count": 2},
        {"prompt": "g", "steps": 4, "long_prompt": True},
    )
    found = planned(path)

    def shown(work: list[plan.Job]) -> list[tuple[str, bool]]:
        return [("".join(r.prompt for r in job.requests), job.together) for job in work]

    assert shown(plan.jobs(found, together=2)) == [
        ("ac", True), ("be", True), ("cf", True), ("d", False), ("f", False), ("g", False),
    ]  # fmt: skip
    # fewer than asked for run on their own, neighbours of one line still in one run
    assert shown(plan.jobs(found, together=4)) == [
        ("accf", True), ("b", False), ("d", False), ("e", False), ("f", False), ("g", False),
    ]  # fmt: skip
    assert shown(plan.jobs(found, {found[0].name}, together=4)) == [
        ("b", False), ("ccff", True), ("d", False), ("e", False), ("g", False),
    ]  # fmt: skip
    assert len(plan.jobs(found, together=1)) == 7
