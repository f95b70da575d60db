"""`sdengine cache`: what is kept, whether it is whole, and making room. On a cache made here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sdengine.backends.cache import Store
from sdengine.cli import app

MADE = {"OpenVINO": "2026.4", "device": "CPU Some CPU", "processor": "p", "threads": "2"}


def what(component: str) -> dict[str, str]:
    return {
        "backend": "openvino",
        "component": component,
        "weights": "w",
        "graph": "g",
        "shapes": "B=2, h=64",
        "precision": "bf16",
    }


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Three entries of 1000, 2000 and 3000 bytes, in the order of their use."""
    import os

    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path))
    monkeypatch.setenv("SDENGINE_CACHE_MAX_GB", "1")
    made = Store()
    for n, name in enumerate(("text_encoder", "unet", "vae_decoder"), 1):
        path = made.keep(what(name), MADE, lambda file, n=n: file.write(bytes([n]) * 1000 * n))
        os.utime(path.parent / "entry.json", (10**9 + n, 10**9 + n))
    return made


def run(*args: object):
    return CliRunner().invoke(app, ["cache", *map(str, args)])


def spoil(store, number):
    entry = store.entries()[number]
    entry.data.write_bytes(b"x" * entry.size)
    return entry


def test_list(store):
    lines = run("list").stdout.splitlines()
    assert "0.000 GB  2001-09-09 01:46  openvino text_encoder bf16 (B=2, h=64)" in lines[0]
    assert lines[1].strip() == "for CPU Some CPU, OpenVINO 2026.4"
    assert lines[-1].endswith(f"GB in {store.root}, of 1.1 at most")


def test_list_as_json(store):
    found = json.loads(run("list", "--json").stdout)
    assert (found["bytes"], found["limit"]) == (6000, 1 << 30)
    assert [e["component"] for e in found["entries"]] == ["text_encoder", "unet", "vae_decoder"]
    assert found["entries"][1]["made"] == MADE
    assert found["entries"][0]["used"] == "2001-09-09T01:46:41+00:00"


def test_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "none"))
    assert json.loads(run("list", "--json").stdout)["entries"] == []
    assert run("verify").stdout == "0 entries; 0 not whole\n"
    assert not (tmp_path / "none").exists()


def test_verify(store):
    assert run("verify").stdout == "3 entries; 0 not whole\n"
    entry = spoil(store, 1)
    result = run("verify")
    assert result.exit_code == 1
    assert result.stdout == (
        f"bad: {entry.folder}: its hash is not the recorded one\n3 entries; 1 not whole\n"
    )
    found = json.loads(run("verify", "--json").stdout)
    assert found["bad"] == [
        {"path": str(entry.folder), "fault": "its hash is not the recorded one"}
    ]


def test_what_is_not_whole_is_removed_on_request(store):
    entry = spoil(store, 1)
    result = run("verify", "--remove")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"removed: {entry.folder}: ")
    assert [e.what["component"] for e in store.entries()] == ["text_encoder", "vae_decoder"]
    assert run("verify").exit_code == 0


@pytest.mark.parametrize(
    ("size", "stay"),
    [
        (0.000005, ["unet", "vae_decoder"]),
        (0.000003, ["vae_decoder"]),
        (0, []),
        (None, ["text_encoder", "unet", "vae_decoder"]),
    ],
)
def test_prune(store, size, stay):
    given = [] if size is None else ["--max-gb", f"{size:f}"]
    assert run("prune", *given).exit_code == 0
    assert [e.what["component"] for e in store.entries()] == stay


def test_prune_as_json(store):
    found = json.loads(run("prune", "--max-gb", 0.000003, "--json").stdout)
    assert [e["component"] for e in found["removed"]] == ["text_encoder", "unet"]
    assert found["bytes"] == 3000


@pytest.mark.parametrize("size", ["-1", "nan", "inf"])
def test_a_size_that_is_none(store, size):
    result = run("prune", f"--max-gb={size}")
    assert result.exit_code == 2
    assert f"--max-gb {size} is no size" in result.stderr
    assert "sdengine cache prune --max-gb 5" in result.stderr
    assert len(store.entries()) == 3


def test_no_place_for_a_cache(monkeypatch):
    from pathlib import Path

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDENGINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    result = run("list")
    assert result.exit_code == 1
    assert "there is no place for a cache" in result.stderr
    assert "SDENGINE_CACHE" in result.stderr
