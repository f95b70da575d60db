"""Files that outlive a crash at any moment: a picture is whole or not there, a log has whole lines.

checked by  tests/serve/test_batch_killed.py, tests/serve/test_batch_storage.py
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError
from ..engine.images import storage_error

PART = ".part"


class Folder:
    """A folder that one process at a time fills. A context manager: it holds the folder's lock.

    Files are written in `.batch` inside it (the same disk, so that a rename is one step), flushed
    to the disk and renamed. What a killed process left in there is removed when the next opens it.

    raises      StorageError; RequestError when another process fills the folder
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = path / ".batch"

    def __enter__(self) -> Folder:
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._parts / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise storage_error(error, self.path) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RequestError(
                f"another batch is writing to {self.path}",
                hint="wait for it, or name another folder: --out",
            ) from None
        for left in self._parts.glob(f"*{PART}"):
            left.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # which unlocks it

    def write(self, name: str, data: bytes) -> Path:
        """A file of that name, whole and on the disk when this returns. Raises StorageError."""
        place, part = self.path / name, self._parts / f"{name}{PART}"
        try:
            with open(part, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, place)
            _sync_folder(self.path)
        except OSError as error:
            raise storage_error(error, place) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return place


class Log:
    """A JSON object a line, appended whole or not at all. A context manager; `rows` are the lines
    that were there.

    A last line without its end was torn by a crash: it is cut off. Any other line that is not an
    object was not written here, and is refused.

    raises      StorageError; RequestError for a file of something else
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Log:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._size = self._mend()
        except OSError as error:
            raise storage_error(error, self.path) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, row: Mapping[str, Any]) -> None:
        """On the disk when this returns; after a StorageError nothing of it is in the file."""
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], self._size + done)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise storage_error(error, self.path) from error
        self._size += len(data)

    def _mend(self) -> int:
        """Its size in bytes, once a torn last line is cut off."""
        with open(self._file, "rb", closefd=False) as stream:
            raw = stream.read()
        whole = raw.rfind(b"\n") + 1
        self.rows = list(self._parsed(raw[:whole]))
        if whole < len(raw):
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        return whole

    def _parsed(self, raw: bytes) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RequestError(
                    f"line {number} of {self.path} is not one of a batch: {line[:40]!r}",
                    hint="move that file away: pictures that are there are not made again",
                )
            yield row


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
