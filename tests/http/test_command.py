"""`sdengine serve` as a command: what it says, and how it ends."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sdengine.engine.errors import NotFound, RequestError
from sdengine.serve.models import Models, named

from .conftest import SDENGINE


def run(*options: str) -> Any:
    return subprocess.run([*SDENGINE, "serve", *options], capture_output=True, text=True,
                          check=False, timeout=100)  # fmt: skip


def test_help_names_every_option():
    found = run("--help")
    assert found.returncode == 0
    for option in ("--model", "--token-file", "--ui", "--queue", "--memory", "--grace"):
        assert option in found.stdout


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--host", "0.0.0.0"], 2, "--token-file"),
        (["--model", "nothing"], 2, "unknown model 'nothing'"),
        (["--model", "a=emoji", "--model", "a=emoji"], 2, "two models are called 'a'"),
        (["--token-file", "/nonexistent"], 1, "cannot be read"),
        (["--port", "70000"], 2, "65535"),
        (["--port", "0", "--backend", "nonesuch"], 2, "nonesuch"),
    ],
)
def test_what_keeps_it_from_starting(options, status, says):
    found = run(*options)
    assert found.returncode == status, found.stderr
    assert says in found.stderr


def test_answers_are_not_held_back(fake):
    """Nagle's algorithm and late acknowledgements together add 40 ms to every answer."""
    with fake.client() as client:
        client.get("/health/live")
        seconds = []
        for _ in range(20):
            begun = time.perf_counter()
            client.get("/metrics")
            seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.03


def test_models_by_name_title_and_hash(fake_bundle: Path):
    models = Models({"one": fake_bundle, "two": fake_bundle})
    one = models.find(None)
    assert one.name == "one"
    assert models.find("two").name == "two"
    assert models.find(one.title) is one
    assert models.find(one.hash) is one
    for other in ("", "..", str(fake_bundle), "One"):
        with pytest.raises(NotFound, match="there is no model") as caught:
            models.find(other)
        assert "one, two" in caught.value.hint


def test_names_of_places(fake_bundle: Path):
    found = {"x/fake": fake_bundle, "emoji": Path("/e/emoji")}
    assert named(["x/fake", "mine=emoji"], found) == {"fake": fake_bundle, "mine": Path("/e/emoji")}
    odd = fake_bundle.parent / "a=b"  # a folder of that name
    odd.symlink_to(fake_bundle)
    assert named([str(odd)], {str(odd): fake_bundle}) == {"fake": fake_bundle}
    with pytest.raises(RequestError, match="two models"):
        named(["x/fake", "fake=emoji"], found)
