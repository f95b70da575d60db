"""A batch whose disk is full stops with a StorageError, leaves nothing half, and goes on later."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdengine import api
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import StorageError
from sdengine.serve import batch, durable, lines, plan

Write = Callable[..., Path]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(out: Path) -> list[str]:
    """Parts of files that nobody finished."""
    return [path.name for path in out.rglob("*.part")]


def test_a_picture_that_does_not_fit_is_not_there(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = write_lines({"prompt": "fox", "seed": 1}, {"prompt": "x" * 3000, "seed": 2}, "bear")
    wanted = plan.items(lines.read(path).good, open_bundle(fake_bundle).id, {})
    engine = batch.Local(lambda preset: api.load(fake_bundle, backend="fake"))
    with files_up_to(6_000), pytest.raises(StorageError, match="larger than allowed") as caught:
        batch.run(wanted, out, engine, keep_going=True)
    assert "ulimit" in caught.value.hint
    assert sorted(path.name for path in out.glob("*.png")) == [wanted[0].name]
    assert left(out) == []
    outcome = batch.run(wanted, out, engine)
    assert (outcome.made, outcome.already) == (2, 1)


def test_a_log_line_that_does_not_fit_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with durable.Log(path) as log:
        log.append({"k": 1})
        size = path.stat().st_size
        with files_up_to(size + 20), pytest.raises(StorageError) as caught:
            log.append({"text": "y" * 100})
        assert caught.value.hint
        assert path.stat().st_size == size
        log.append({"k": 2})
    with durable.Log(path) as log:
        assert log.rows == [{"k": 1}, {"k": 2}]


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="a file is where a folder should be") as caught,
        durable.Folder(tmp_path / "file" / "out"),
    ):
        pass
    assert "name another folder" in caught.value.hint


ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=128k tmpfs "$1"
status=0
"$2" -c 'from sdengine.cli import main; main()' batch "$3" --out "$1/out" --model "$4" \
    --backend fake --quiet || status=$?
ls "$1/out" > "$5/listing"
find "$1" -name '*.part' > "$5/parts"
cp "$1/out/results.jsonl" "$5/results.jsonl"
cp -r "$1/out" "$5/out"
exit $status
"""


def test_a_full_disk(fake_bundle: Path, write_lines: Write, tmp_path: Path) -> None:
    """A file system of 128 KiB, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    own = [unshare, "--mount", "--map-root-user"]
    if unshare is None or subprocess.run([*own, "true"], capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here; the limits of the tests above say the same")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir(), kept.mkdir()
    path = write_lines(*[{"prompt": f"{k} " * 2000, "seed": k, "steps": 1} for k in range(60)])
    shell = [*own, "sh", "-c", ON_A_SMALL_DISK, "sh", disk, sys.executable, path, fake_bundle, kept]
    result = subprocess.run(shell, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 1, result.stderr
    assert "error: cannot save to" in result.stderr
    assert "no space left on the disk" in result.stderr
    assert "hint: free some space" in result.stderr
    names = [name for name in (kept / "listing").read_text().split() if name.endswith(".png")]
    assert 5 < len(names) < 60
    assert (kept / "parts").read_text() == ""
    rows = [json.loads(line) for line in (kept / "results.jsonl").read_text().splitlines()]
    assert {row["picture"] for row in rows} <= set(names)
    wanted = plan.items(lines.read(path).good, open_bundle(fake_bundle).id, {"backend": "fake"})
    engine = batch.Local(lambda preset: api.load(fake_bundle, backend="fake"))
    outcome = batch.run(wanted, kept / "out", engine)  # the same folder, on a larger disk
    assert (outcome.already, outcome.made) == (len(names), 60 - len(names))
