"""What the tests of checkpoints share: damaged and edited copies of a small one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="checkpoints are read by the export half, which needs torch")

from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Remembered hashes go to a folder of this run, never to the user's."""
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def base(make_checkpoint) -> Path:
    return make_checkpoint("base")


@pytest.fixture(scope="session")
def base_arrays(base) -> Arrays:
    return load_file(base)


@pytest.fixture
def edited(base, base_arrays, tmp_path):
    """`edited(edit, name="edited.safetensors")`: the small base model after `edit(arrays)`, with
    its sidecar beside it."""

    def make(edit: Callable[[Arrays], None], name: str = "edited.safetensors") -> Path:
        arrays = dict(base_arrays)
        edit(arrays)
        path = tmp_path / name
        save_file(arrays, path)
        shutil.copy(base.with_suffix(".yaml"), path.with_suffix(".yaml"))
        return path

    return make


@pytest.fixture
def sidecar(base):
    """The parsed sidecar of the small base model, to be changed and written elsewhere."""
    return json.loads(base.with_suffix(".yaml").read_text())
