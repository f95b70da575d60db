"""A batch that is killed at any moment: nothing half, nothing twice, nothing missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")
PICTURES = 24
KILLS = 20


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """Where flushing takes no time: what a killed process leaves is the same there."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        yield Path(folder)


def test_killed_at_random_moments_and_between_any_two_steps(
    fake_bundle: Path, write_lines: Callable[..., Path], quick_disk: Path
) -> None:
    lines = [{"prompt": f"fox {k}", "steps": 1, "count": 2} for k in range(PICTURES // 2)]
    script = Path(__file__).with_name("killed_batch.py")
    command = [sys.executable, script, fake_bundle, write_lines(*lines), quick_disk / "whole"]
    result = subprocess.run(
        [*command, str(KILLS), "11"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name, found in json.loads(result.stdout).items():
        assert (found["half"], found["again"], found["lost"]) == (0, 0, 0), (name, found)
    found = json.loads(result.stdout)
    assert found["chance"]["interrupted"] >= KILLS // 4, "too few kills hit a running batch"
    assert found["call"]["rounds"] > 3 * 6, "a picture takes six steps and more"
