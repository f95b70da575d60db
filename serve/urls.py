"""Pictures that are answered as addresses: kept in memory, for a while, and not too many."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from time import monotonic

from ..engine.errors import NotFound


class Urls:
    """keep_s, keep_bytes   how long, and how many bytes in all"""

    def __init__(self, keep_s: float, keep_bytes: int) -> None:
        self._keep_s, self._keep_bytes = keep_s, keep_bytes
        self._kept: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, kind: str) -> str:
        """The name under which it is found. Nobody can guess it."""
        name = f"{secrets.token_urlsafe(18)}.{kind}"
        self._kept[name] = (monotonic(), data, kind)
        self._bytes += len(data)
        self._forget()
        return name

    def find(self, name: str) -> tuple[bytes, str]:
        """(bytes, kind). Raises NotFound."""
        self._forget()
        if name not in self._kept:
            raise NotFound(
                f"there is no picture {name[:60]!r}",
                hint=f"pictures are kept for {self._keep_s:g} s; ask for b64_json to have them",
            )
        _, data, kind = self._kept[name]
        return data, kind

    def _forget(self) -> None:
        now = monotonic()
        while self._kept:
            name, (when, data, _) = next(iter(self._kept.items()))
            if now - when <= self._keep_s and self._bytes <= self._keep_bytes:
                return
            del self._kept[name]
            self._bytes -= len(data)
