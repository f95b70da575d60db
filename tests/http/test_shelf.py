"""Models that a worker holds, on pretended pipelines and a pretended memory."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from sdengine.engine.errors import BundleError, UnknownName
from sdengine.serve.shelf import Shelf, bytes_of, resident


class Pipe:
    def __init__(self, path) -> None:
        self.path, self.closed = path, False

    def close(self) -> None:
        self.closed = True


class Machine:
    """Every open pipe takes 100."""

    def __init__(self) -> None:
        self.pipes = []
        self.fails = False

    def load(self, path):
        if self.fails:
            raise BundleError("broken", hint="mend it")
        self.pipes.append(Pipe(path))
        return self.pipes[-1]

    def held(self) -> int:
        return sum(100 for pipe in self.pipes if not pipe.closed)


@pytest.fixture
def paths(fake_bundle, tmp_path):
    return {n: shutil.copytree(fake_bundle, tmp_path / n) for n in ("a", "b", "c")}


def test_the_one_not_used_for_longest_is_closed(paths):
    machine = Machine()
    size = bytes_of(paths["a"])
    shelf = Shelf(paths, machine.load, 199 + size, machine.held)
    a, b = shelf.get("a"), shelf.get("b")
    assert shelf.get("a") is a
    shelf.get("c")
    assert (a.closed, b.closed) == (False, True)
    assert shelf.names == ["a", "c"]
    assert not shelf.crowded
    shelf.close()
    assert machine.held() == 0


def test_one_is_held_whatever_it_takes(paths):
    machine = Machine()
    shelf = Shelf(paths, machine.load, 1, machine.held)
    for name in "abca":
        assert not shelf.get(name).closed
        assert len(shelf.names) == 1
    assert shelf.crowded  # closing did not bring it under the limit: a new process is due


def test_a_changed_bundle_is_opened_anew_and_only_then(paths):
    machine = Machine()
    shelf = Shelf(paths, machine.load, None, machine.held)
    old = shelf.get("a")
    assert shelf.get("a") is old
    manifest = paths["a"] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    os.utime(manifest, (1, 1))
    new = shelf.get("a")
    assert (old.closed, new.closed) == (True, False)
    machine.fails = True
    os.utime(manifest, (2, 2))
    assert shelf.get("a") is new  # a bad one changes nothing, and is not tried each time
    shutil.rmtree(paths["a"])
    assert shelf.get("a") is new
    with pytest.raises(UnknownName):
        shelf.get("../a")


def test_the_memory_is_this_process_s():
    before = resident()
    block = bytearray(200 * 2**20)
    assert resident() - before > 150 * 2**20
    del block
