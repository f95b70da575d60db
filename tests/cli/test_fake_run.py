"""The whole way of a prompt in a process of its own: real command line, real pipeline, and networks
with known answers in the engine's place."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

INTERRUPTIBLE = [sys.executable, str(Path(__file__).with_name("interruptible.py"))]
SDENGINE = [sys.executable, "-c", "from sdengine.cli import main; main()"]
LONG = "fox " * 2500

Result = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Path(__file__).parents[1] / "tiny_bundle.py"
    spec = importlib.util.spec_from_file_location("tiny_bundle", place)
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny.write(folder, tiny.vocabulary())
    return folder


@pytest.fixture
def command(bundle: Path) -> list[str]:
    return [*SDENGINE, "run", "--model", str(bundle), "--backend", "fake", "--steps", "3"]


def shell(command: list[str], *options: str | bytes, cwd: Path) -> Result:
    environment = {**os.environ, "SDENGINE_CACHE": str(cwd.parent / "cache")}
    return subprocess.run(
        [*command, *options], capture_output=True, cwd=cwd, env=environment, check=False
    )


def done(result: Result) -> dict[str, Any]:
    """The JSON line of a run that went well."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_prompt_becomes_pictures(command: list[str], tmp_path: Path) -> None:
    options = ["--prompt", "a red fox", "--seed", "7", "--count", "3", "--batch-size", "2"]
    result = shell(command, *options, "--json", cwd=tmp_path)
    found = done(result)
    assert [p["path"] for p in found["pictures"]] == [f"a-red-fox.{s}.png" for s in (7, 8, 9)]
    assert found["request"]["steps"] == 3
    assert found["about"]["backend"] == "fake"
    assert b"backend fake" in result.stderr
    assert b"picture 3 of 3" in result.stderr
    assert b"denoise " in result.stderr
    with Image.open(tmp_path / "a-red-fox.8.png") as image:
        assert image.size == (128, 64)  # the bundle's native size
        assert "Seed: 8" in image.info["parameters"]


def test_a_seed_is_a_picture(command: list[str], tmp_path: Path) -> None:
    """Alone or among others, the same bytes."""
    shell(command, "-p", "fox", "--seed", "7", "--count", "2", "--out", "x.png", cwd=tmp_path)
    shell(command, "-p", "fox", "--seed", "8", "--out", "alone.png", cwd=tmp_path)
    assert (tmp_path / "x.8.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    assert (tmp_path / "x.7.png").read_bytes() != (tmp_path / "x.8.png").read_bytes()


def test_control_c_in_the_middle_of_a_run(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*INTERRUPTIBLE, *command, "-p", "fox", "--seed", "7", "--count", "10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"fox.7.png\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in err
    names = sorted(os.listdir(tmp_path))
    assert set(out.decode().split()) <= set(names)
    for name in names:
        with Image.open(tmp_path / name) as image:
            image.load()


def test_what_clip_cuts_off_is_shown(command: list[str], tmp_path: Path) -> None:
    result = shell(command, "--prompt", LONG, "--seed", "7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    warning = next(w for w in result.stderr.splitlines() if w.startswith(b"warning: "))
    assert warning.endswith(b"fox")
    assert b"cut off" in warning


def test_a_size_between_the_steps_is_said_to_be_cropped(command: list[str], tmp_path: Path) -> None:
    result = shell(command, "--width", "100", "--height", "60", "--out", "x.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert b"warning: 100x60" in result.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (100, 60)


@pytest.mark.parametrize(
    ("options", "status", "message", "hint"),
    [
        (["--prompt", b"caf\xe9"], 2, b"not valid Unicode", b"UTF-8"),
        (["--backend", "openvin"], 2, b"unknown backend 'openvin'", b"did you mean 'openvino'"),
        (["--precision", "int8"], 1, b"int8", b"f32"),
        (["--precision", "f23"], 2, b"unknown precision 'f23'", b"did you mean 'f32'"),
        (["--model", "emojy"], 2, b"unknown model 'emojy'", b"did you mean 'emoji'"),
        (["--model", "no/such/place"], 1, b"no/such/place", b"bundle"),
    ],
)
def test_what_is_refused(
    command: list[str],
    tmp_path: Path,
    options: list[str | bytes],
    status: int,
    message: bytes,
    hint: bytes,
) -> None:
    result = shell(command, *options, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert result.stdout == b""
    assert b"Traceback" not in result.stderr
    *_, error, empty, last = result.stderr.splitlines()
    assert error.startswith(b"error: ")
    assert message in error
    assert empty == b""
    assert last.startswith(b"hint: ")
    assert hint in last
    assert os.listdir(tmp_path) == []


def test_a_run_is_stopped_saved_and_gone_on_with(command: list[str], tmp_path: Path) -> None:
    asked = ["--prompt", "fox", "--seed", "7", "--sampler", "euler_a"]
    whole = shell(command, *asked, "--out", "whole.png", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    saving = ["--stop-after", "2", "--save-latents", "run.latents"]
    stopped = shell(command, *asked, *saving, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == b"run.latents\n"
    assert not list(tmp_path.glob("fox*.png"))
    resume = [*command[: command.index("--steps")], "--from-latents", "run.latents"]
    shell(resume, "--out", "again.png", cwd=tmp_path)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    other = shell(resume, "--guidance", "3", cwd=tmp_path)
    assert other.returncode == 2
    assert b"guidance is 7.5 there, 3.0 here" in other.stderr


def test_stopping_without_a_place_to_save_is_refused(command: list[str], tmp_path: Path) -> None:
    result = shell(command, "--stop-after", "2", cwd=tmp_path)
    assert result.returncode == 2
    assert b"--save-latents run.latents" in result.stderr


def test_a_picture_is_repeated_from_itself(command: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (128, 64), "teal").save(tmp_path / "in.png")
    asked = ["--image", "in.png", "--strength", "0.7", "--seed", "5", "--out", "first.png"]
    assert shell(command, *asked, cwd=tmp_path).returncode == 0
    again = [*command[: command.index("--steps")], "--from", "first.png"]
    result = shell(again, "--out", "second.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    changed = shell(again, "--seed", "6", "--out", "third.png", cwd=tmp_path)
    assert changed.returncode == 0, changed.stderr
    assert (tmp_path / "third.png").read_bytes() != (tmp_path / "first.png").read_bytes()


def test_a_preview_is_written_while_it_runs(command: list[str], tmp_path: Path) -> None:
    result = shell(command, "-p", "fox", "--preview", "2", "--out", "x.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "x.preview.png") as image:
        assert image.size == (128, 64)
