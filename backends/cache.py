"""Machine-bound artefacts: compiled networks that only this machine and library can read.

An entry is a folder, `compiled/<what>-<made>/`, with the artefact `data` and its `entry.json`. The
name hashes two sets of fields that the JSON holds in clear:

what   the content: component, weights, graph, shapes, precision
made   the maker: library version, device, processor

so that an entry that is there for the same content, but from another maker, can be named as the
reason why one is built anew. A folder appears by one rename: two processes cannot meet half an
entry, and the loser of a race takes the winner's. A full or read-only disk is said, and the run
goes on without the cache.

They lie in engine.paths.cache_dir(), up to $SDENGINE_CACHE_MAX_GB gigabytes (20 unless set; 0 keeps
none): the least recently used go first.

checked by  tests/unit/test_backend_cache.py
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..engine.errors import RequestError, StorageError
from ..engine.paths import cache_dir

log = logging.getLogger("sdengine.backends")

Key = Mapping[str, str]

FORMAT = 1
GIB = 1 << 30
ABANDONED_S = 24 * 3600
CHUNK = 1 << 20


def default_limit() -> int:
    """Bytes. Raises RequestError when the variable is not a number of 0 or more."""
    text = os.environ.get("SDENGINE_CACHE_MAX_GB", "20")
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise RequestError(
            f"SDENGINE_CACHE_MAX_GB is {text!r}, expected a number of gigabytes, 0 or more",
            hint="unset it for 20, or set it to 0 to keep no compiled networks",
        )
    return int(size * GIB)


@dataclass(frozen=True)
class Entry:
    """One artefact. `used` is a time in seconds since the epoch."""

    folder: Path
    what: Key
    made: Key
    size: int
    sha256: str
    stamp: tuple[int, int, int]
    used: float

    @property
    def data(self) -> Path:
        return self.folder / "data"


def open_store() -> Store | None:
    """The user's own; None, with the reason in the log, where there is no place for one.

    raises  RequestError: $SDENGINE_CACHE_MAX_GB is not a size
    """
    try:
        return Store()
    except StorageError as error:
        log.warning("compiled networks are not kept: %s; %s", error.message, error.hint)
        return None


class Store:
    """The entries below one root. With a limit of 0 bytes nothing is kept, and nothing found."""

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        self.root = (cache_dir() if root is None else root) / "compiled"
        self.limit = default_limit() if limit is None else limit

    def find(self, what: Key, made: Key) -> Path | None:
        """The artefact for these keys, checked. None when it must be made; the log says why."""
        if self.limit == 0:
            return None
        folder = self._folder(what, made)
        if not folder.is_dir():
            if (changed := self._outdated(what, made)) is not None:
                log.info("%s: compiling again: %s", _label(what), changed)
            return None
        entry = _read(folder)
        fault = "its record cannot be read" if entry is None else _fault(entry, full=False)
        if entry is None or fault is not None:
            self.discard(what, made, str(fault))
            return None
        try:
            os.utime(folder / "entry.json")
        except OSError:
            pass  # a read-only cache serves as well; only the order of eviction suffers
        return entry.data

    def keep(self, what: Key, made: Key, write: Callable[[BinaryIO], object]) -> Path | None:
        """Store what `write` writes. None where that cannot be; the log says why."""
        if self.limit == 0:
            return None
        try:
            return self._keep(what, made, write)
        except Exception as error:
            # The network is compiled and runs: nothing that befalls its copy may stop it.
            log.warning("%s: cannot be kept in %s: %s", _label(what), self.root, error)
            return None

    def discard(self, what: Key, made: Key, reason: str) -> None:
        """Remove an entry that is of no use."""
        log.warning("%s: the compiled copy is discarded: %s", _label(what), reason)
        remove_entry(self._folder(what, made))

    def entries(self) -> list[Entry]:
        """All whole entries, least recently used first."""
        found = [entry for folder in self._folders() if (entry := _read(folder)) is not None]
        return sorted(found, key=lambda e: e.used)

    def verify(self) -> list[tuple[Path, str]]:
        """The folders that hold no good entry, and why; every byte is read."""
        bad = []
        for folder in self._folders():
            entry = _read(folder)
            fault = "its record cannot be read" if entry is None else _fault(entry, full=True)
            if fault is not None:
                bad.append((folder, fault))
        return bad

    def prune(self, limit: int | None = None) -> list[Entry]:
        """Remove the least recently used entries until the rest fits; and what killed runs left."""
        self._sweep()
        room = self.limit if limit is None else limit
        entries = self.entries()
        total, removed = sum(e.size for e in entries), []
        for entry in entries:
            if total <= room:
                break
            remove_entry(entry.folder)
            removed.append(entry)
            total -= entry.size
        return removed

    def _keep(self, what: Key, made: Key, write: Callable[[BinaryIO], object]) -> Path | None:
        self.root.mkdir(parents=True, exist_ok=True)
        final = self._folder(what, made)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.root))
        try:
            with (partial / "data").open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            record = {
                "format": FORMAT,
                "what": dict(what),
                "made": dict(made),
                "sha256": _sha256(partial / "data"),
                "stamp": _stamp(partial / "data"),
            }
            text = json.dumps(record, indent=2, sort_keys=True)
            (partial / "entry.json").write_text(text, encoding="utf-8")
            self._put(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.prune()
        kept = final / "data"
        return kept if kept.is_file() else None  # larger than all that may be kept

    def _put(self, partial: Path, final: Path) -> None:
        try:
            partial.rename(final)
        except OSError as error:
            # Another process was faster: its entry is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def _folder(self, what: Key, made: Key) -> Path:
        return self.root / f"{_hash(what)}-{_hash(made)}"

    def _folders(self) -> Iterator[Path]:
        if self.root.is_dir():
            yield from sorted(p for p in self.root.iterdir() if not p.name.startswith("."))

    def _outdated(self, what: Key, made: Key) -> str | None:
        """`OpenVINO 2026.3 -> 2026.4`: how the nearest entry for the same content differs."""
        changes = [
            [f"{k} {e.made.get(k, 'none')} -> {v}" for k, v in made.items() if e.made.get(k) != v]
            for e in self.entries()
            if e.what == what
        ]
        return min((", ".join(c) for c in changes), key=len, default=None)

    def _sweep(self) -> None:
        """Remove the partial folders of runs that were killed."""
        for folder in self.root.glob(".partial-*"):
            try:
                old = time.time() - folder.stat().st_mtime > ABANDONED_S
            except OSError:
                continue  # gone meanwhile
            if old:
                shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> Entry | None:
    """An entry from its record; None if there is none that this version understands."""
    path = folder / "entry.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            return None
        device, size, mtime = record["stamp"]
        return Entry(
            folder=folder,
            what={str(k): str(v) for k, v in record["what"].items()},
            made={str(k): str(v) for k, v in record["made"].items()},
            size=int(size),
            sha256=str(record["sha256"]),
            stamp=(int(device), int(size), int(mtime)),
            used=path.stat().st_mtime,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fault(entry: Entry, *, full: bool) -> str | None:
    """Why an artefact is not what was written. Its bytes are read where its stamp differs."""
    try:
        stamp = _stamp(entry.data)
        if stamp[1] != entry.size:
            return f"it holds {stamp[1]} bytes, {entry.size} were written"
        if (full or stamp != entry.stamp) and _sha256(entry.data) != entry.sha256:
            return "its hash is not the recorded one"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def _stamp(path: Path) -> tuple[int, int, int]:
    """Inode, bytes, time of change: equal stamps spare us the hash."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(key: Key) -> str:
    text = json.dumps(dict(key), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(what: Key) -> str:
    """`openvino unet (bf16, B=2, h=64, w=64)`: what a message is about."""
    shapes = f", {what['shapes']}" if what.get("shapes") else ""
    return f"{what['backend']} {what['component']} ({what['precision']}{shapes})"


def remove_entry(folder: Path) -> None:
    """Out of sight by one rename, then gone: nobody meets half an entry."""
    doomed = folder.with_name(f".partial-doomed-{os.getpid()}-{folder.name}")
    try:
        folder.rename(doomed)
    except OSError:
        doomed = folder
    shutil.rmtree(doomed, ignore_errors=True)
