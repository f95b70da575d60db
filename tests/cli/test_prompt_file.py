"""Many prompts in one command, and all pictures on one sheet."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdengine import api, cli
from sdengine.engine import grid, prompts, watermark
from sdengine.engine.errors import RequestError, StorageError
from sdengine.engine.metadata import read_metadata
from sdengine.engine.request import Request


def sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = sibling("stub")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = stub.StubLoad()
    monkeypatch.setattr(api, "load", stand_in)
    return stand_in


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["run", *(str(a) for a in arguments)])


def test_a_line_is_a_prompt(place: Path) -> None:
    """Blank lines are skipped; a byte order mark, Windows' line ends and no last one are legal; so
    is a line separator of Unicode inside a prompt."""
    (place / "p.txt").write_bytes("\ufeffa fox\r\n\r\n  \n ä dog \u2028 cat\r\na bird".encode())
    assert prompts.read(place / "p.txt") == ["a fox", "ä dog \u2028 cat", "a bird"]


def test_every_prompt_is_drawn_with_its_own_seeds(load: Any, place: Path) -> None:
    (place / "p.txt").write_text("fox\n\ndog\ncat\n")
    options = ["--from-file", "p.txt", "--seed", 7, "--count", 3, "--batch-size", 2]
    result = run(*options, "--steps", 2)
    assert result.exit_code == 0, result.stderr
    names = [f"fox.{s}.png" for s in (7, 8, 9)] + [f"dog.{s}.png" for s in (10, 11, 12)]
    assert result.stdout.split() == names + [f"cat.{s}.png" for s in (13, 14, 15)]
    asked = {"count": 3, "batch_size": 2, "steps": 2}
    assert load.pipeline.requests == [
        Request(prompt=prompt, seed=seed, **asked)
        for prompt, seed in (("fox", 7), ("dog", 10), ("cat", 13))
    ]
    assert len(load.calls) == 1  # the model is opened once
    assert "picture 9 of 9" in result.stderr


def test_one_file_name_for_many_prompts(load: Any, place: Path) -> None:
    (place / "p.txt").write_text("fox\ndog\n")
    result = run("--from-file", "p.txt", "--seed", 7, "--out", "x.png")
    assert result.stdout.split() == ["x.7.png", "x.8.png"]


def test_json_is_one_line_a_prompt(load: Any, place: Path) -> None:
    (place / "p.txt").write_text("fox\ndog\n")
    result = run("--from-file", "p.txt", "--seed", 7, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["request"]["prompt"] for line in lines] == ["fox", "dog"]
    assert [line["pictures"] for line in lines] == [
        [{"path": "fox.7.png", "seed": 7}], [{"path": "dog.8.png", "seed": 8}],
    ]  # fmt: skip


def test_variations_count_up_and_their_seed_stays() -> None:
    asked = Request(seed=3, variation_seed=9, variation_strength=0.1, count=2)
    found = prompts.each(asked, ["a", "b"])
    assert [(one.seed, one.variation_seed) for one in found] == [(3, 9), (3, 11)]


def test_a_drawn_seed_is_drawn_once() -> None:
    first, second = prompts.each(Request(count=2), ["a", "b"])
    assert first.seed is not None
    assert second.seed == first.seed + 2


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"\n \n", "holds no prompt", "one prompt a line"),
        (b"caf\xe9\n", "no UTF-8 text: byte 3 is 0xe9", "UTF-8"),
    ],
)
def test_a_file_without_prompts(place: Path, content: bytes, message: str, hint: str) -> None:
    (place / "p.txt").write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        prompts.read(place / "p.txt")
    assert hint in caught.value.hint


def test_a_file_that_is_not_there(place: Path) -> None:
    with pytest.raises(StorageError, match="No such file") as caught:
        prompts.read(place / "p.txt")
    assert "check the path" in caught.value.hint


def test_seeds_past_their_end() -> None:
    with pytest.raises(RequestError, match="seed 4294967293 and 4 pictures of 2") as caught:
        prompts.each(Request(seed=2**32 - 3, count=2), ["a", "b"])
    assert "4294967292" in caught.value.hint


@pytest.mark.parametrize("other", [["--prompt", "x"], ["--save-latents", "s"]])
def test_what_a_file_of_prompts_does_not_go_with(load: Any, place: Path, other: list[str]) -> None:
    (place / "p.txt").write_text("fox\n")
    result = run("--from-file", "p.txt", *other)
    assert result.exit_code == 2
    assert "--from-file goes with neither" in result.stderr
    assert "hint: leave those out" in result.stderr
    assert load.calls == []


# The sheet


def test_the_sheet_is_torchvisions() -> None:
    """make_grid, which the reference calls: rows of `columns`, two black pixels around each."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("torchvision.utils")
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 6, 8, 3), np.uint8)
    for columns in (1, 2, 3, 5, 9):
        wanted = utils.make_grid(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), nrow=columns)
        found = grid.sheet([Image.fromarray(p) for p in pixels], columns)
        np.testing.assert_array_equal(np.asarray(found), wanted.numpy().transpose(1, 2, 0))


@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (9, (3, 3))])
def test_a_sheet_is_about_square(count: int, size: tuple[int, int]) -> None:
    made = grid.sheet([Image.new("RGB", (10, 20))] * count)
    assert made.size == (size[0] * 12 + 2, size[1] * 22 + 2)


def test_all_pictures_of_the_command_are_on_the_sheet(load: Any, place: Path) -> None:
    (place / "p.txt").write_text("fox\ndog\n")
    options = ["--from-file", "p.txt", "--count", 3, "--grid", "new/all.png"]
    result = run(*options, "--grid-columns", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split()[6:] == ["new/all.png"]
    with Image.open(place / "new/all.png") as made:
        assert made.size == (3 * 66 + 2, 2 * 66 + 2)
        assert made.getpixel((2, 2)) == (255, 165, 0)


def test_a_sheet_of_one_run_says_how_it_was_made_and_is_marked(load: Any, place: Path) -> None:
    asked = ["--prompt", "fox", "--seed", 7, "--count", 20, "--steps", 1]
    assert run(*asked, "--grid", "all.png").exit_code == 0
    said = read_metadata(place / "all.png").request
    assert said is not None
    assert (said["prompt"], said["seed"], said["count"]) == ("fox", 7, 20)
    with Image.open(place / "all.png") as made:
        assert watermark.decode(np.asarray(made))[1] == watermark.TEXT
    assert run(*asked, "--grid", "bare.png", "--no-watermark").exit_code == 0
    with Image.open(place / "bare.png") as made:
        assert watermark.decode(np.asarray(made))[1] is None


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--grid", "all.png", "--grid-columns", 0], "grid-columns is 0", "in a row"),
        (["--grid", "all.bmp"], "'all.bmp'", ".png"),
    ],
)
def test_what_a_sheet_cannot_be(load: Any, options: list[object], message: str, hint: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert hint in result.stderr.splitlines()[-1]
    assert load.calls == []
