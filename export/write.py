"""A bundle on disk, all of it or nothing.

Everything is put together in a temporary sibling; the manifest is written last, the folder is
opened with the runtime's own reader, and one rename makes it visible.

checked by  tests/unit/test_export_write.py, tests/parity/test_export_killed.py
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..engine.bundle import FORMAT, MANIFEST, Bundle, ModelFacts, ParityRecord, open_bundle
from ..engine.errors import StorageError
from ..engine.hashes import sha256_of
from ..engine.spec import TensorSpec

RESERVE = 64 << 20  # bytes beside the weights: graphs, manifest, vocabulary, and some air


@contextmanager
def partial_folder(out: Path, needed: int) -> Iterator[Path]:
    """A temporary sibling of `out` to fill; whatever is left of it at the end is removed.

    needed      bytes that will be written into it
    raises      StorageError: no room, no permission, a file where a folder should be
    """
    parent = out.parent
    folder = parent / f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    with storage_errors(folder):
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        free = shutil.disk_usage(parent).free
        if free < needed + RESERVE:
            raise StorageError(
                f"no room in {parent}: the bundle needs {_mb(needed + RESERVE)}, "
                f"{_mb(free)} are free",
                hint="free some space, or choose another place with --out",
            )
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """What the file system refuses, as a StorageError with a hint."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        where = error.filename if error.filename is not None else place
        raise StorageError(
            f"cannot write {where}: {error.strerror}",
            hint=_HINTS.get(error.errno, "check the folder, or choose another place with --out"),
        ) from error


_HINTS: Mapping[int | None, str] = {
    errno.ENOSPC: "the disk is full: free some space, or choose another place with --out",
    errno.EDQUOT: "your quota is used up: free some space, or choose another place with --out",
    errno.EACCES: "you may not write there: change its permissions, or choose another --out",
    errno.EPERM: "you may not write there: change its permissions, or choose another --out",
    errno.EROFS: "that disk is read-only: choose another place with --out",
    errno.ENOTDIR: "there is a file where a folder should be: choose another place with --out",
    errno.EEXIST: "there is a file where a folder should be: choose another place with --out",
}


def remove_stale(out: Path) -> None:
    """Remove what killed exports to the same place have left."""
    name = re.compile(rf"\.{re.escape(out.name)}\.(partial|old)-(\d+)-[0-9a-f]+")
    for folder in out.parent.iterdir():
        found = name.fullmatch(folder.name)
        if found is not None and not _alive(int(found[2])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether a process of this number runs: an export at work is left alone."""
    if pid == os.getpid():
        return True
    if os.name != "posix":
        return False  # there, signal 0 would end the process; and an open file cannot be removed
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_free(out: Path) -> bool:
    """Whether a bundle may be renamed to `out` without losing anything."""
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def manifest(
    folder: Path,
    facts: ModelFacts,
    tokenizer: str,
    components: Mapping[str, Any],
    targets: Mapping[str, Any],
    parity: Sequence[ParityRecord],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a filled folder.

    tokenizer   path of the vocabulary in the bundle
    components  as docs/bundle-format.md has them
    hashes      path -> SHA-256, of files for which it is known already
    """
    model = {k: v for k, v in asdict(facts).items() if v is not None}
    model["tokenizer"]["file"] = tokenizer
    files = listed(folder, sorted(p for p in folder.rglob("*") if p.is_file()), hashes)
    return {
        "format": FORMAT,
        "producer": producer(),
        "model": model,
        "components": components,
        "files": files,
        "targets": targets,
        "parity": [asdict(r) for r in parity],
    }


def listed(
    folder: Path, paths: Iterable[Path], hashes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """path in the bundle -> size and hash"""
    files = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest = hashes[name] if name in hashes else sha256_of(path)
        files[name] = {"size": path.stat().st_size, "sha256": digest}
    return files


def producer() -> dict[str, str]:
    """Versions of what wrote the bundle."""
    from .. import __version__

    names = ("torch", "onnx", "onnx-ir", "openvino", "onnxruntime")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"sdengine": __version__, **found}


def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in specs]


def finish(folder: Path, out: Path, content: Mapping[str, Any]) -> Bundle:
    """Write the manifest, check the whole with the runtime's reader, and make it visible.

    An older bundle at `out` is moved aside first and removed afterwards; who reads it goes on.
    """
    with storage_errors(out):
        _flush_all(folder)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        _flush(folder)
        open_bundle(folder, unfinished=True)
        aside = None
        if not is_free(out):
            aside = out.parent / f".{out.name}.old-{os.getpid()}-{secrets.token_hex(4)}"
            os.rename(out, aside)
        try:
            os.rename(folder, out)
        except OSError:
            if aside is not None:
                os.rename(aside, out)
            raise
        _flush(out.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return open_bundle(out)


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)


def _flush(path: Path) -> None:
    """To the disk itself; folders cannot be flushed on Windows."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
