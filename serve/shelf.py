"""The models that a worker holds: opened when first asked for, closed when memory is short, and
opened anew when their bundle has changed on disk.

checked by  tests/http/test_shelf.py
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..engine.bundle import MANIFEST, open_bundle
from ..engine.errors import SdengineError, UnknownName

log = logging.getLogger("sdengine.serve")

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
Mark = tuple[int, int, int]


class Closable(Protocol):
    def close(self) -> None: ...


P = TypeVar("P", bound=Closable)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):  # not Linux: the most that it ever held
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    return pages * resource.getpagesize()


def mark_of(bundle: Path) -> Mark | None:
    """What changes when a bundle is replaced; None when it is gone."""
    try:
        found = (bundle / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def bytes_of(bundle: Path) -> int:
    """What its files weigh: about what it takes to hold it."""
    return sum(record.size for record in open_bundle(bundle).files.values())


@dataclass
class _Held(Generic[P]):
    pipe: P
    mark: Mark | None


class Shelf(Generic[P]):
    """paths    name -> bundle
    load        opens one
    limit       bytes that this process may hold; one model is held whatever it takes
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        load: Callable[[Path], P],
        limit: int | None = None,
        held_bytes: Callable[[], int] = resident,
    ) -> None:
        self._paths, self._load, self._limit, self._bytes = paths, load, limit, held_bytes
        self._held: OrderedDict[str, _Held[P]] = OrderedDict()
        self.closed = 0

    @property
    def names(self) -> list[str]:
        return list(self._held)

    @property
    def crowded(self) -> bool:
        """Closing models did not give their memory back: only a new process will."""
        return self._limit is not None and self.closed > 0 and self._bytes() > self._limit

    def get(self, name: str) -> P:
        """Raises UnknownName; BundleError, BackendError when it cannot be opened."""
        if name not in self._paths:
            raise UnknownName("model", name, self._paths)
        path = self._paths[name]
        held, mark = self._held.get(name), mark_of(path)
        if held is None:
            self._make_room(bytes_of(path))
            held = self._held[name] = _Held(self._load(path), mark)
            self._make_room(0, keep=name)
        elif mark is not None and mark != held.mark:
            self._swap(name, path, held, mark)
        self._held.move_to_end(name)
        return self._held[name].pipe

    def _swap(self, name: str, path: Path, old: _Held[P], mark: Mark) -> None:
        """The new one is opened before the old one is closed; a bad one changes nothing."""
        try:
            self._make_room(bytes_of(path), keep=name)
            new = self._load(path)
        except SdengineError as error:
            old.mark = mark
            log.warning("%s has changed and cannot be opened: %s; the old one stays", name, error)
            return
        self._held[name] = _Held(new, mark)
        old.pipe.close()
        log.info("%s has changed: it was opened anew", name)

    def _make_room(self, more: int, keep: str | None = None) -> None:
        """Close what was not used for longest until `more` bytes fit."""
        while self._limit is not None and self._bytes() + more > self._limit:
            names = [name for name in self._held if name != keep]
            if not names:
                return
            self._held.pop(names[0]).pipe.close()
            self.closed += 1
            log.info("closed %s: the models may take %d MiB", names[0], self._limit >> 20)
            _give_back()

    def close(self) -> None:
        while self._held:
            self._held.popitem()[1].pipe.close()


def _give_back() -> None:
    """What was freed goes back to the system, where the C library can do that."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
