"""File names made from prompts, and the place of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdengine.engine.describe import size
from sdengine.engine.errors import StorageError
from sdengine.engine.outputs import Output, stem
from sdengine.engine.paths import cache_dir


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A slice of pizza!", "a-slice-of-pizza"),
        ("  café, crème  brûlée ", "cafe-creme-brulee"),
        ("../../etc/passwd", "etc-passwd"),
        ("<b>&amp;\n\0</b>", "b-amp-b"),
        ("狐", "picture"),
        ("", "picture"),
        ("x" * 300, "x" * 60),
        ("word " * 40, "-".join(["word"] * 12)),
    ],
)
def test_a_prompt_as_a_file_name(prompt: str, name: str) -> None:
    assert stem(prompt) == name


@given(st.text())
def test_no_prompt_makes_a_name_that_some_system_refuses(prompt: str) -> None:
    name = stem(prompt)
    assert 1 <= len(name) <= 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name[0] != "-"
    assert name[-1] != "-"


def test_a_folder_that_has_a_suffix_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "v2.1").mkdir()
    assert Output.parse(str(tmp_path / "v2.1")) == Output(folder=tmp_path / "v2.1")
    assert Output.parse(str(tmp_path / "v2.2")) == Output(file=tmp_path / "v2.2")
    assert Output.parse(None) == Output(folder=Path())


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"SDENGINE_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/sdengine"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/sdengine"),
        ({"SDENGINE_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/sdengine"),
        ({}, "/home/me/.cache/sdengine"),
    ],
)
def test_the_place_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    for name in ("SDENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(place)


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDENGINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(StorageError) as caught:
        cache_dir()
    assert "home directory" in caught.value.message
    assert "SDENGINE_CACHE" in caught.value.hint


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_730_000_000, "1.73 GB"),
        (25_300_000_000, "25.3 GB"),
        (4_000_000_000_000, "4000 GB"),
    ],
)
def test_sizes_as_disks_are_sold(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
