"""`sdengine batch` as a user meets it: what it prints where, its exit status, its progress."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sdengine.cli import app
from sdengine.engine.errors import RequestError
from sdengine.serve import batch, progress

Write = Callable[..., Path]
Shell = Callable[..., Result]


@pytest.fixture
def shell(fake_bundle: Path, tmp_path: Path) -> Shell:
    def call(path: Path, *options: str) -> Result:
        words = ["batch", path, "--out", tmp_path / "out", "--model", fake_bundle, "-b", "fake"]
        return CliRunner().invoke(app, [*map(str, words), *options])

    return call


def made(tmp_path: Path) -> int:
    return len(list((tmp_path / "out").glob("*.png")))


def test_paths_are_printed_and_the_rest_is_said_elsewhere(
    shell: Shell, write_lines: Write, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.jpg"
    path = write_lines("fox", {"prompt": "bear", "count": 3})
    result = shell(path, "--common", '{"steps": 2}', "--grid", str(sheet))
    assert result.exit_code == 0, result.output
    *pictures, last = result.stdout.splitlines()
    assert all(Path(name).is_file() for name in pictures)
    assert len(pictures) == 4
    assert last == str(sheet)
    with Image.open(sheet) as image:
        assert image.size == (2 * 130 + 2, 2 * 66 + 2)
    assert "4 of 4 pictures" in result.stderr
    assert "4 made in" in result.stderr
    with Image.open(pictures[0]) as image:
        assert "Steps: 2" in image.info["parameters"]


def test_one_line_of_json(shell: Shell, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("fox", "bear")
    first = json.loads(shell(path, "--json", "--quiet").stdout)
    assert (first["wanted"], first["made"], first["already"]) == (2, 2, 0)
    again = shell(path, "--json", "--quiet", "--grid", str(tmp_path / "s.png"))
    second = json.loads(again.stdout)
    assert (second["made"], second["already"], second["failed"]) == (0, 2, 0)
    assert second["pictures"] == first["pictures"]
    assert second["grid"] == str(tmp_path / "s.png")
    assert again.stderr == ""


def test_a_bad_line_stops_it_before_anything_runs(
    shell: Shell, write_lines: Write, tmp_path: Path
) -> None:
    path = write_lines("fox", {"promt": "bear"}, {"strength": 0.5})
    result = shell(path)
    assert result.exit_code == 2
    assert "error: 2 lines of" in result.stderr
    assert "line 2: unknown request field 'promt' (did you mean " in result.stderr
    assert "line 3: txt2img takes no strength" in result.stderr
    assert "hint: mend them, or leave them out with --keep-going" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_keep_going_leaves_it_out_and_says_so(
    shell: Shell, write_lines: Write, tmp_path: Path
) -> None:
    path = write_lines("fox", {"promt": "bear"}, "panda")
    result = shell(path, "--keep-going")
    assert result.exit_code == 1
    assert made(tmp_path) == 2
    assert "left out: line 2: unknown request field 'promt'" in result.stderr
    assert "1 lines left out" in result.stderr


def test_a_prompt_that_cannot_be_read_fails_when_it_runs(
    shell: Shell, write_lines: Write, tmp_path: Path
) -> None:
    path = write_lines("fox", {"prompt": "\ud800"}, "panda")
    stopped = shell(path)
    assert (stopped.exit_code, made(tmp_path)) == (2, 1)
    assert "not valid Unicode" in stopped.stderr
    gone_on = shell(path, "--keep-going")
    assert (gone_on.exit_code, made(tmp_path)) == (1, 2)
    assert "failed: line 2: " in gone_on.stderr
    assert "hint: " in gone_on.stderr


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--format", "gif"], "--format gif is not a known picture format", "png, jpg"),
        (["--common", "steps"], "--common is not JSON", "--common '{"),
        (["--grid", "sheet.gif"], ".gif is not a known picture format", ".png"),
        (["--grid-columns", "0"], "grid-columns is 0", "in a row"),
    ],
)
def test_options_that_make_no_sense(
    shell: Shell, write_lines: Write, options: list[str], message: str, hint: str
) -> None:
    result = shell(write_lines("fox"), *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert hint in result.stderr.rpartition("hint: ")[2]


def test_formats(shell: Shell, write_lines: Write, tmp_path: Path) -> None:
    assert shell(write_lines("fox"), "--format", "JPG").exit_code == 0
    (path,) = (tmp_path / "out").glob("*.jpg")
    with Image.open(path) as image:
        assert image.format == "JPEG"
    with pytest.raises(RequestError):
        batch.check_suffix("")


def test_lines_of_progress_say_when_it_will_be_done() -> None:
    now = [0.0]
    stream = io.StringIO()
    tick = progress.Lines(stream, lambda: now[0])
    for seconds, done in ((0, 0.1), (4, 1.0), (10, 2.5), (12, 3.0), (150, 30.0), (500, 100.0)):
        now[0] = seconds
        tick(done, 100)
    tick(100.0, 100)
    assert stream.getvalue().splitlines() == [
        "0 of 100 pictures",
        "2 of 100 pictures, 4.00 s each, 6:30 left",
        "30 of 100 pictures, 5.00 s each, 5:50 left",
        "100 of 100 pictures, 5.00 s each, 0:00 left",
    ]
    assert progress.clock_text(3725.4) == "1:02:05"


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.progress(False, stream) as tick:
        tick(3.4, 12)
    assert "3 of 12" in stream.getvalue()
    silent = Terminal()
    with progress.progress(True, silent) as tick:
        tick(3.4, 12)
    assert silent.getvalue() == ""
