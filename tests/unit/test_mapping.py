"""A mapped file gives its pages back: counted by the kernel, not by us."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sdengine.backends.mapping import Mapped

MIB = 1 << 20
linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel counts pages")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.arange(4 * MIB, dtype=np.uint32).tobytes())  # 16 MiB
    return path


def resident(mapped: Mapped) -> int:
    """Bytes of the mapping that are in memory now."""
    address, inside = mapped.data.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(n, 16) for n in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is not listed")


@linux
def test_what_was_read_is_given_back_and_comes_again(file):
    mapped = Mapped(file)
    wanted = int(np.arange(4 * MIB, dtype=np.uint64).sum())
    for _ in range(2):
        assert int(mapped.data.view(np.uint32).sum(dtype=np.uint64)) == wanted
        assert resident(mapped) == 16 * MIB
        mapped.release()
        assert resident(mapped) == 0


@linux
def test_a_block_leaves_nothing_behind(file, monkeypatch):
    monkeypatch.setattr("sdengine.backends.mapping.EVERY_S", 0.001)
    mapped = Mapped(file)
    with mapped.passing() as data:
        total = sum(int(data.sum(dtype=np.uint64)) for _ in range(5))
    assert total == 5 * int(np.frombuffer(file.read_bytes(), np.uint8).sum(dtype=np.uint64))
    assert resident(mapped) == 0


def test_a_block_that_fails_ends_its_sweeper(file):
    import threading

    mapped, before = Mapped(file), threading.active_count()
    with pytest.raises(ValueError, match="refused"), mapped.passing():
        raise ValueError("refused")
    assert threading.active_count() == before


def test_it_says_that_it_is_writable_and_is_not(file):
    """openvino.Tensor takes nothing else; a write must not change the file, nor be lost."""
    program = f"""
        from pathlib import Path
        from sdengine.backends.mapping import Mapped
        data = Mapped(Path({str(file)!r})).data
        print(data.flags.writeable, flush=True)
        data[0] = 1
        print("written")
        """
    before = file.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode < 0, "ended by a signal"
    assert done.stdout == "True\n"
    assert file.read_bytes() == before
