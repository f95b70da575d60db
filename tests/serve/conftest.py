"""A bundle for the fake backend, and batches on it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """`write_lines({"prompt": "fox"}, "a panda")`: Path of a file of requests."""

    def write(*values: Any, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    return write
