"""A bundle appears whole or not at all; nothing that was there before is lost."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys

import pytest

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BundleError, CorruptPart, NotABundle, StorageError
from sdengine.export import write

pytestmark = pytest.mark.export


def fill(folder, handmade_bundle):
    """A valid bundle's files into a partial folder; returns the manifest."""
    manifest = handmade_bundle.write(folder)
    (folder / "manifest.json").unlink()
    return manifest


@pytest.fixture
def hand():
    """The module tests/tiny_bundle.py."""
    import importlib.util
    from pathlib import Path

    place = Path(__file__).parents[1] / "tiny_bundle.py"
    spec = importlib.util.spec_from_file_location("tiny_bundle", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finished_bundle_is_the_only_thing_left(tmp_path, hand):
    out = tmp_path / "deep" / "model"
    with write.partial_folder(out, 0) as folder:
        assert folder.name.startswith(".model.partial-")
        write.finish(folder, out, fill(folder, hand))
    assert open_bundle(out).facts.name == "tiny"
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_failure_leaves_nothing(tmp_path, hand):
    out = tmp_path / "model"

    def export():
        with write.partial_folder(out, 0) as folder:
            fill(folder, hand)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        export()
    assert not list(tmp_path.iterdir())


def test_what_the_reader_refuses_is_not_made_visible(tmp_path, hand):
    out = tmp_path / "model"

    def export():
        with write.partial_folder(out, 0) as folder:
            manifest = fill(folder, hand)
            (folder / "unet" / "full.onnx").write_bytes(b"something else")
            write.finish(folder, out, manifest)

    with pytest.raises(CorruptPart):
        export()
    assert not list(tmp_path.iterdir())


def test_a_partial_folder_does_not_open_by_itself(tmp_path, hand):
    with write.partial_folder(tmp_path / "model", 0) as folder:
        hand.write(folder)
        with pytest.raises(NotABundle, match="did not finish"):
            open_bundle(folder)


def test_older_bundle_is_replaced_by_renames(tmp_path, hand):
    out = tmp_path / "model"
    hand.write(out)
    old = (out / "unet" / "full.onnx").open("rb")
    with write.partial_folder(out, 0) as folder:
        write.finish(folder, out, fill(folder, hand))
    assert old.read() == (out / "unet" / "full.onnx").read_bytes()
    old.close()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_older_bundle_comes_back_when_the_rename_fails(tmp_path, hand, monkeypatch):
    out = tmp_path / "model"
    hand.write(out)
    real = os.rename

    def rename(source, to):
        if ".partial-" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        real(source, to)

    monkeypatch.setattr(write.os, "rename", rename)
    with pytest.raises(StorageError, match="No space"), write.partial_folder(out, 0) as folder:
        write.finish(folder, out, fill(folder, hand))
    assert open_bundle(out).facts.name == "tiny"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_the_dead_are_removed_and_others_kept(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    dead = child.stdout.decode().strip()
    (tmp_path / f".model.partial-{dead}-00ff").mkdir()
    (tmp_path / f".model.old-{dead}-00ff").mkdir()
    alive = [
        f".model.partial-{os.getppid()}-00ff",
        ".model2.partial-1-00ff",
        ".model.partial-notes",
    ]
    for name in alive:
        (tmp_path / name).mkdir()
    with write.partial_folder(tmp_path / "model", 0):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(alive)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"needs 2,667 MB, 1 MB are free") as error:
        with write.partial_folder(tmp_path / "model", 2_600_000_000):
            pytest.fail("nothing may be written")
    assert "--out" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "check the folder"),
    ],
)
def test_what_the_system_refuses_has_a_hint(tmp_path, number, hint):
    with pytest.raises(StorageError, match=os.strerror(number)) as error:
        with write.partial_folder(tmp_path / "model", 0):
            raise OSError(number, os.strerror(number), str(tmp_path / "model"))
    assert hint in error.value.hint
    assert not list(tmp_path.iterdir())


def test_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "models").write_text("mine")
    with pytest.raises(StorageError, match="cannot write") as error:
        with write.partial_folder(tmp_path / "models" / "one", 0):
            pytest.fail("there is no folder to write in")
    assert "a file where a folder should be" in error.value.hint
    assert (tmp_path / "models").read_text() == "mine"


@pytest.mark.skipif(
    os.name != "posix" or os.getuid() == 0, reason="root may write everywhere; Windows has no mode"
)
def test_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StorageError, match="cannot write") as error:
            with write.partial_folder(tmp_path / "model", 0):
                pytest.fail("it may not be written")
        assert "permissions" in error.value.hint
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_an_error_of_ours_passes_unchanged(tmp_path):
    with pytest.raises(BundleError, match="as it is"):
        with write.partial_folder(tmp_path / "model", 0):
            raise BundleError("as it is", hint="none")


def test_empty_folder_may_be_taken(tmp_path):
    assert write.is_free(tmp_path / "nothing")
    assert write.is_free(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    assert not write.is_free(tmp_path / "link")
    assert not write.is_free(tmp_path)
