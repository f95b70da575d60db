"""SHA-256 of files, computed once for each content and remembered.

A digest is remembered under the file's device, inode, size and both times in nanoseconds: any write
to the file changes at least one of them. The memory is a convenience: when it cannot be read or
written, digests are computed again, and nothing else happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import StorageError
from .paths import cache_dir

Progress = Callable[[int, int], None]

_KEPT = 1024  # entries; one takes about 130 bytes
_BLOCK = 1 << 20


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Hex digest of the file's content, computed now.

    progress    called with (bytes done, bytes in all)
    raises      StorageError when the file cannot be read
    """
    digest, done = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def remembered_sha256(path: Path, *, again: bool = False, progress: Progress | None = None) -> str:
    """As sha256_of, but computed once for each content.

    again       compute it even when it is remembered
    """
    before = _key(path)
    if not again and (known := _recall().get(before)) is not None:
        return known
    digest = sha256_of(path, progress)
    if before == _key(path):  # else somebody writes to it right now
        _remember(before, digest)
    return digest


def _key(path: Path) -> str:
    try:
        s = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot read {path}: {error.strerror}", hint="check the file and its permissions"
    )


def _memory() -> Path:
    return cache_dir() / "hashes.json"


def _recall() -> dict[str, str]:
    try:
        found = json.loads(_memory().read_bytes())
    except (OSError, ValueError, RecursionError, StorageError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and len(v) == 64}


def _remember(key: str, digest: str) -> None:
    """Read, add, replace in one rename; of two writers at once one entry may be lost."""
    entries = _recall() | {key: digest}
    kept = dict(list(entries.items())[-_KEPT:])
    try:
        folder = _memory().parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".hashes.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(kept, file)
            os.replace(name, _memory())
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, StorageError):
        return
