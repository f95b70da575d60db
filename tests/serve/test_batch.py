"""Batches on networks with known answers: the pictures of single runs, made once each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdengine import api
from sdengine.cli import app
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import NumericsError, RequestError
from sdengine.serve import batch, contact, durable, lines, plan

Write = Callable[..., Path]
LINES = (
    {"prompt": "a red fox", "seed": 7, "steps": 3, "count": 3, "batch_size": 2},
    {"prompt": "a panda", "seed": 7, "steps": 2, "sampler": "euler_a", "width": 64},
    {"prompt": "a bear", "seed": 1, "steps": 4, "image": "in.png", "strength": 0.5},
    {"prompt": "a cat", "seed": 2, "steps": 4, "image": "in.png", "mask": "mask.png"},
)


@pytest.fixture
def given(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 128 * 3).reshape(64, 128, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "in.png")
    mask = np.zeros((64, 128), np.uint8)
    mask[:, :64] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")


def planned(path: Path, bundle: Path) -> list[plan.Item]:
    return plan.items(lines.read(path).good, open_bundle(bundle).id, {})


def local(bundle: Path) -> batch.Local:
    return batch.Local(lambda preset: api.load(bundle, backend="fake"))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def sdengine(*words: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.mark.usefixtures("given")
def test_the_pictures_are_those_of_single_runs(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    engine = ("--model", fake_bundle, "--backend", "fake")
    printed = sdengine("batch", write_lines(*LINES), "--out", out, *engine).splitlines()
    for line in LINES:
        flags = {name: str(value) for name, value in line.items()}
        for name in ("image", "mask"):
            if name in line:
                flags[name] = str(tmp_path / str(line[name]))
        options = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)]
        sdengine("run", *options, *engine, "--out", tmp_path / "single")
    single = sorted((tmp_path / "single").iterdir())
    made = sorted(Path(name) for name in printed)
    assert made == sorted(out.glob("*.png"))
    assert len(single) == len(made) == 6
    for one, other in zip(single, made, strict=True):
        assert other.name.startswith(one.stem)
        with Image.open(one) as a, Image.open(other) as b:
            assert np.array_equal(np.asarray(a), np.asarray(b))
            assert a.info == b.info  # what it says of its making, too


@pytest.mark.ov
def test_the_embedded_model_gives_the_same_pictures(write_lines: Write, tmp_path: Path) -> None:
    line = {"prompt": "a red fox", "seed": 7, "steps": 1, "count": 2}
    wanted = planned(write_lines(line), api.EMBEDDED["emoji"])
    with api.load(precision="f32", threads=1) as pipe:
        alone = [pipe(prompt="a red fox", seed=seed, steps=1).image for seed in (7, 8)]
        batch.run(wanted, tmp_path, batch.Local(lambda preset: nullcontext(pipe)))
    for item, image in zip(wanted, alone, strict=True):
        with Image.open(tmp_path / item.name) as made:
            assert np.array_equal(np.asarray(made), np.asarray(image))


def test_started_again_nothing_is_made_twice(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    wanted = planned(write_lines({"prompt": "fox", "count": 5}), fake_bundle)
    first = batch.run(wanted, tmp_path / "out", local(fake_bundle))
    assert (first.made, first.already) == (5, 0)

    class Refusing(batch.Local):
        def run(self, *_: object) -> Iterator[batch.Made | batch.Failed]:
            raise AssertionError("there was nothing to do")

    second = batch.run(wanted, tmp_path / "out", Refusing(lambda _: None))  # type: ignore[arg-type,return-value]
    assert (second.made, second.already) == (0, 5)
    assert second.paths == first.paths == [tmp_path / "out" / item.name for item in wanted]
    assert [row["picture"] for row in rows(tmp_path / "out")] == [item.name for item in wanted]


def test_what_was_taken_away_is_made_again_alone(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = planned(write_lines({"prompt": "fox", "count": 5}), fake_bundle)
    batch.run(wanted, out, local(fake_bundle))
    before = (out / wanted[2].name).read_bytes()
    (out / wanted[2].name).unlink()
    again = batch.run(wanted, out, local(fake_bundle))
    assert (again.made, again.already) == (1, 4)
    assert (out / wanted[2].name).read_bytes() == before


def test_a_log_with_a_torn_line_or_none_is_mended(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = planned(write_lines({"prompt": "fox", "count": 4}), fake_bundle)
    batch.run(wanted, out, local(fake_bundle))
    log = out / "results.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    assert batch.run(wanted, out, local(fake_bundle)).made == 0
    assert [row["picture"] for row in rows(out)] == [item.name for item in wanted]
    assert [row.get("recovered", False) for row in rows(out)] == [False, False, False, True]
    log.unlink()
    assert batch.run(wanted, out, local(fake_bundle)).made == 0
    assert [row["recovered"] for row in rows(out)] == [True] * 4


def test_a_log_of_something_else_is_left_alone(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    (tmp_path / "results.jsonl").write_text("name,value\n1,2\n")
    wanted = planned(write_lines("fox"), fake_bundle)
    with pytest.raises(RequestError, match=r"line 1 of .*results.jsonl is not one") as caught:
        batch.run(wanted, tmp_path, local(fake_bundle))
    assert "move that file away" in caught.value.hint
    assert (tmp_path / "results.jsonl").read_text() == "name,value\n1,2\n"


def test_what_is_no_picture_is_not_taken_for_one(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    wanted = planned(write_lines("fox"), fake_bundle)
    (tmp_path / wanted[0].name).write_bytes(b"not a picture")
    with pytest.raises(RequestError, match="not a picture") as caught:
        batch.run(wanted, tmp_path, local(fake_bundle))
    assert "PNG" in caught.value.hint


def test_two_batches_do_not_share_a_folder(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    wanted = planned(write_lines("fox"), fake_bundle)
    with durable.Folder(tmp_path / "out"):
        with pytest.raises(RequestError, match="another batch is writing to") as caught:
            batch.run(wanted, tmp_path / "out", local(fake_bundle))
    assert "--out" in caught.value.hint
    assert batch.run(wanted, tmp_path / "out", local(fake_bundle)).made == 1


class Stumbling:
    """The second job fails, the others do not."""

    most: int | None = None

    def __init__(self, inner: batch.Local) -> None:
        self._inner = inner

    def run(self, work: Any, report: batch.Report) -> Iterator[batch.Made | batch.Failed]:
        yield from self._inner.run(work[:1], report)
        yield batch.Failed(work[1].items, NumericsError("NaN in unet", hint="use f32"))
        yield from self._inner.run(work[2:], report)


def test_a_failure_stops_the_batch_or_is_gone_past(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    out, failures = tmp_path / "out", []
    path = write_lines("fox", {"prompt": "panda", "count": 2}, "bear")
    wanted = planned(path, fake_bundle)
    engine = Stumbling(local(fake_bundle))
    with pytest.raises(NumericsError):
        batch.run(wanted, out, engine)
    assert [row["line"] for row in rows(out)] == [1]
    hooks = batch.Hooks(on_failure=failures.append)
    (out / wanted[0].name).unlink()  # so that the panda is the second again
    outcome = batch.run(wanted, out, engine, keep_going=True, hooks=hooks)
    assert (outcome.made, outcome.failed, outcome.whole) == (2, 2, False)
    failed = rows(out)[-2]
    assert (failed["line"], failed["error"], failed["hint"]) == (2, "NumericsError", "use f32")
    assert [item.line for item in failures[0].items] == [2, 2]
    mended = batch.run(wanted, out, local(fake_bundle))
    assert (mended.made, mended.already, mended.whole) == (2, 2, True)


def test_a_picture_that_fails_does_not_take_those_after_it_along(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    line = {"prompt": "fox", "seed": 20, "count": 5, "steps": 2}
    wanted = planned(write_lines(line), fake_bundle)
    batch.run(wanted, tmp_path / "whole", local(fake_bundle))
    with api.load(fake_bundle, backend="fake") as pipe:
        stream = pipe.stream

        def stumbling(request: Any, **options: Any) -> Iterator[Any]:
            for k, result in enumerate(stream(request, **options)):
                if request.seed + k == 22:
                    raise NumericsError("NaN in unet", hint="use f32")
                yield result

        pipe.stream = stumbling  # type: ignore[method-assign]
        engine = batch.Local(lambda preset: nullcontext(pipe))
        outcome = batch.run(wanted, tmp_path / "out", engine, keep_going=True)
    assert (outcome.made, outcome.failed) == (4, 1)
    (failed,) = [row for row in rows(tmp_path / "out") if "failed" in row]
    assert failed["failed"] == [wanted[2].name]
    for item in (*wanted[:2], *wanted[3:]):
        made, whole = (tmp_path / where / item.name for where in ("out", "whole"))
        assert made.read_bytes() == whole.read_bytes()


def test_the_command_opens_the_model_as_it_is_told(
    fake_bundle: Path, write_lines: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    load = api.load

    def noted(place: Any, **how: Any) -> Any:
        asked.append(how)
        return load(fake_bundle, backend="fake")

    monkeypatch.setattr(api, "load", noted)
    words = ("batch", write_lines("fox"), "--out", tmp_path / "out", "--model", fake_bundle)
    sdengine(*words, "--device", "GPU.1", "--low-memory")
    assert asked == [{"device": "GPU.1", "low_memory": True, "preset": None}]


def test_presets_are_loaded_one_after_another(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    asked: list[str | None] = []

    def load(preset: str | None) -> Any:
        asked.append(preset)
        return api.load(fake_bundle, backend="fake", preset=preset)

    path = write_lines("a", {"prompt": "b", "preset": "exact"}, "c", {"preset": "exact"})
    outcome = batch.run(planned(path, fake_bundle), tmp_path / "out", batch.Local(load))
    assert outcome.made == 4
    assert asked == [None, "exact"]


def test_a_sheet_holds_pictures_of_any_size_in_their_order(tmp_path: Path) -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    sizes = {"red": (64, 64), "green": (600, 300), "blue": (32, 64)}
    for name, colour in colours.items():
        Image.new("RGB", sizes[name], colour).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in colours]
    contact.sheet(paths, tmp_path / "sheet.png", 2)
    with Image.open(tmp_path / "sheet.png") as made:
        assert made.size == (2 * 258 + 2, 2 * 130 + 2)  # cells of 256x128, gaps of 2
        assert made.getpixel((2 + 128, 2 + 64)) == colours["red"]
        assert made.getpixel((2 + 20, 2 + 64)) == (0, 0, 0)
        assert made.getpixel((260 + 3, 2 + 3)) == colours["green"]
        assert made.getpixel((2 + 128, 132 + 64)) == colours["blue"]
        assert made.getpixel((260 + 128, 132 + 64)) == (0, 0, 0)


def test_pictures_of_one_call_are_those_of_single_runs(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    path = write_lines(*[{"prompt": f"fox {k}", "steps": 2} for k in range(5)])
    wanted = planned(path, fake_bundle)
    batch.run(wanted, tmp_path / "alone", local(fake_bundle))
    calls = []
    with api.load(fake_bundle, backend="fake") as pipe:
        together = pipe.together

        def counted(requests: Any, **options: Any) -> Any:
            calls.append(len(requests))
            return together(requests, **options)

        pipe.together = counted  # type: ignore[method-assign]
        engine = batch.Local(lambda preset: nullcontext(pipe))
        outcome = batch.run(wanted, tmp_path / "four", engine, together=4)
    assert (outcome.made, calls) == (5, [4])
    for item in wanted:
        with Image.open(tmp_path / "alone" / item.name) as a:
            with Image.open(tmp_path / "four" / item.name) as b:
                assert np.array_equal(np.asarray(a), np.asarray(b))


def test_one_that_cannot_be_made_does_not_take_its_neighbours_along(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    path = write_lines("fox", "\ud800", "bear", "panda")
    wanted = planned(path, fake_bundle)
    outcome = batch.run(wanted, tmp_path, local(fake_bundle), keep_going=True, together=4)
    assert (outcome.made, outcome.failed) == (3, 1)
    assert not (tmp_path / wanted[1].name).exists()
