"""The store of compiled networks: keys, reasons, corruption, eviction, races, bad disks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sdengine.backends.cache import Store, default_limit, open_store
from sdengine.engine.errors import RequestError

WHAT = {"backend": "openvino", "component": "unet", "precision": "bf16", "shapes": "B=2, h=64"}
MADE = {"OpenVINO": "2026.4", "device": "CPU A", "threads": "2"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, limit=1000)


def put(store, what=WHAT, made=MADE, data=b"compiled"):
    return store.keep(what, made, lambda file: file.write(data))


def test_what_is_kept_is_found(store, tmp_path):
    assert store.find(WHAT, MADE) is None
    path = put(store)
    assert path is not None
    assert store.find(WHAT, MADE) == path
    assert path.read_bytes() == b"compiled"
    assert Store(tmp_path).find(WHAT, MADE) == path
    (entry,) = store.entries()
    assert (entry.what, entry.made, entry.size, entry.data) == (WHAT, MADE, 8, path)


def test_the_record_is_readable(store):
    record = json.loads((put(store).parent / "entry.json").read_text())
    assert record["what"] == WHAT
    assert record["made"] == MADE


@pytest.mark.parametrize("field", WHAT)
def test_other_content_is_another_entry(store, field, caplog):
    put(store)
    with caplog.at_level(logging.INFO, "sdengine.backends"):
        assert store.find({**WHAT, field: "other"}, MADE) is None
    assert caplog.messages == [], "not stale: it was never there"


def test_another_maker_is_named_as_the_reason(store, caplog):
    put(store, made={**MADE, "OpenVINO": "2026.2", "device": "CPU B"})
    put(store, made={**MADE, "OpenVINO": "2026.3"})
    with caplog.at_level(logging.INFO, "sdengine.backends"):
        assert store.find(WHAT, MADE) is None
    assert caplog.messages == [
        "openvino unet (bf16, B=2, h=64): compiling again: OpenVINO 2026.3 -> 2026.4"
    ]


SPOIL = {
    "shorter": (lambda d: (d / "data").write_bytes(b"comp"), "it holds 4 bytes, 8 were written"),
    "changed": (lambda d: (d / "data").write_bytes(b"c0mpiled"), "its hash is not the recorded"),
    "gone": (lambda d: (d / "data").unlink(), "it cannot be read: No such file"),
    "no record": (lambda d: (d / "entry.json").unlink(), "its record cannot be read"),
    "bad record": (lambda d: (d / "entry.json").write_text("{"), "its record cannot be read"),
    "not ours": (lambda d: (d / "entry.json").write_text("[]"), "its record cannot be read"),
    "format": (lambda d: (d / "entry.json").write_text('{"format": 2}'), "its record cannot be"),
}


@pytest.mark.parametrize("case", SPOIL)
def test_a_spoiled_entry_is_dropped_with_the_reason(store, case, caplog):
    spoil, reason = SPOIL[case]
    folder = put(store).parent
    time.sleep(0.01)  # so that the time of change differs
    spoil(folder)
    (fault,) = store.verify()
    assert fault[0] == folder
    assert fault[1].startswith(reason)
    assert store.find(WHAT, MADE) is None
    assert f"the compiled copy is discarded: {reason}" in caplog.text
    assert not folder.exists()
    assert put(store) is not None
    assert store.find(WHAT, MADE) is not None


def test_a_moved_cache_is_read_in_full_and_used(store, tmp_path):
    put(store)
    moved = tmp_path / "moved"
    moved.mkdir()
    subprocess.run(["cp", "-r", str(store.root), str(moved)], check=True)
    assert Store(moved).find(WHAT, MADE) is not None


def test_verify_reads_every_byte(store):
    """A change that the stamp does not show: same size, same time, same inode."""
    path = put(store)
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"C")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.find(WHAT, MADE) == path
    assert store.verify() == [(path.parent, "its hash is not the recorded one")]


def test_the_least_recently_used_goes_first(store):
    for i in range(3):
        put(store, {**WHAT, "component": str(i)}, data=b"x" * 400 if i else b"x" * 100)
        time.sleep(0.02)
    assert [e.what["component"] for e in store.entries()] == ["0", "1", "2"]
    assert store.find({**WHAT, "component": "0"}, MADE)
    put(store, {**WHAT, "component": "3"}, data=b"x" * 200)
    assert [e.what["component"] for e in store.entries()] == ["2", "0", "3"]
    removed = store.prune(300)
    assert [e.what["component"] for e in removed] == ["2"]
    assert store.prune(0) != []
    assert store.entries() == []


def test_an_entry_over_the_cap_does_not_stay(store):
    put(store, data=b"x" * 2000)
    assert store.entries() == []


def test_a_cap_of_nothing_keeps_nothing(tmp_path):
    store = Store(tmp_path / "none", limit=0)
    assert put(store) is None
    assert not (tmp_path / "none").exists()


def test_a_cap_of_nothing_finds_nothing(store):
    put(store)
    assert Store(store.root.parent, limit=0).find(WHAT, MADE) is None
    assert store.find(WHAT, MADE) is not None, "and nothing is thrown away"


def test_a_failing_write_leaves_nothing_and_is_said(store, caplog):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    assert store.keep(WHAT, MADE, full) is None
    assert "openvino unet (bf16, B=2, h=64): cannot be kept in" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(store.root.iterdir()) == []


def test_a_full_disk(store, caplog):
    """A real one: the kernel's limit on the size of a file."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        assert put(store, data=b"x" * 10000) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in caplog.text
    assert list(store.root.iterdir()) == []


def test_a_root_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert store.find(WHAT, MADE) is None
    assert put(store) is None
    assert "cannot be kept in" in caplog.text
    assert store.entries() == []
    assert store.verify() == []


def test_what_killed_runs_left_is_swept_after_a_day(store):
    put(store)
    old, new = store.root / ".partial-old", store.root / ".partial-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "data").write_bytes(b"half")
    os.utime(old, (0, 0))
    store.prune()
    assert not old.exists()
    assert new.exists(), "another process may be writing it"
    assert len(store.entries()) == 1


def test_many_processes_at_once(tmp_path):
    """All write one entry, read it, and discard it now and then: each finds it whole or not."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from sdengine.backends.cache import Store
        what = {"backend": "b", "component": "c", "precision": "f32", "shapes": ""}
        store, data = Store(Path(sys.argv[1])), b"0123456789" * 5000
        for i in range(60):
            path = store.find(what, {})
            try:
                if path is not None and path.read_bytes() != data:
                    sys.exit(f"half an entry at {i}")
            except FileNotFoundError:
                pass
            store.keep(what, {}, lambda file: file.write(data))
            if i % 7 == int(sys.argv[2]):
                store.discard(what, {}, "for the test")
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "cannot be kept" not in errors
    assert Store(tmp_path).verify() == []


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1", 1 << 30), ("0.5", 1 << 29), (None, 20 << 30)]
)
def test_the_cap_from_the_environment(text, size, monkeypatch):
    monkeypatch.delenv("SDENGINE_CACHE_MAX_GB", raising=False)
    if text is not None:
        monkeypatch.setenv("SDENGINE_CACHE_MAX_GB", text)
    assert default_limit() == size


@pytest.mark.parametrize("text", ["", "twenty", "-1", "inf", "nan"])
def test_a_bad_cap(text, monkeypatch):
    monkeypatch.setenv("SDENGINE_CACHE_MAX_GB", text)
    with pytest.raises(RequestError, match="SDENGINE_CACHE_MAX_GB is") as caught:
        default_limit()
    assert "unset it for 20" in caught.value.hint


def test_the_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "here"))
    assert Store().root == tmp_path / "here" / "compiled"


def test_no_place_for_a_cache_is_said_and_no_error(monkeypatch, caplog):
    """As in a container whose user has no home."""
    for name in ("SDENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert open_store() is None
    assert "compiled networks are not kept: " in caplog.text
    assert "set SDENGINE_CACHE" in caplog.text


def test_what_is_larger_than_all_that_may_be_kept_is_not_kept(tmp_path):
    """The caller goes on with what it compiled: there is no file to read back."""
    store = Store(tmp_path, limit=10)
    assert store.keep({"graph": "a"}, {"library": "1"}, lambda file: file.write(b"x" * 100)) is None
    assert store.entries() == []
