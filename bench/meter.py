"""Times each call of each network, by standing between a pipeline and its sessions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ..engine.pipeline import Pipeline
from ..engine.ports import Array, Session, Sessions


@dataclass(frozen=True)
class Call:
    """One call: `what` is "open", "bind" or "run"."""

    component: str
    what: str
    dims: tuple[tuple[str, int], ...]
    seconds: float


class Watch:
    """Sessions that note how long each network takes; everything else passes through."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._noted: list[Call] = []

    @classmethod
    def on(cls, pipe: Pipeline) -> Watch:
        """Put one into a loaded pipeline."""
        watch = cls(pipe._sessions)
        pipe._sessions = watch
        return watch

    def __call__(self, component: str, dims: Mapping[str, int], *, paired: bool = False) -> Session:
        start = perf_counter()
        session = self._sessions(component, dims, paired=paired)
        shape = tuple(sorted(dims.items()))
        self._noted.append(Call(component, "open", shape, perf_counter() - start))
        return Watched(session, self._noted, component, shape)

    def close(self) -> None:
        self._sessions.close()

    def clear(self) -> None:
        self._noted.clear()

    def calls(self) -> list[dict[str, Any]]:
        """One entry for each network, kind of call and shape, with the seconds of each call."""
        return grouped(self._noted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sessions, name)


class Watched:
    """A session of `component`, loaded for `dims`."""

    def __init__(
        self, session: Session, noted: list[Call], component: str, dims: tuple[tuple[str, int], ...]
    ) -> None:
        self._session, self._noted = session, noted
        self._component, self._dims = component, dims

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        start = perf_counter()
        result = self._session(feeds)
        self._add("run", start)
        return result

    def bind(self, feeds: Mapping[str, Array]) -> Session:
        start = perf_counter()
        bound = self._session.bind(feeds)
        self._add("bind", start)
        return Watched(bound, self._noted, self._component, self._dims)

    def graph(self, name: str) -> Session:
        own = self._component if name == "full" else f"{self._component}/{name}"
        return Watched(self._session.graph(name), self._noted, own, self._dims)

    def _add(self, what: str, start: float) -> None:
        call = Call(self._component, what, self._dims, perf_counter() - start)
        self._noted.append(call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def grouped(calls: Iterable[Call]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[float]] = {}
    for call in calls:
        groups.setdefault((call.component, call.what, call.dims), []).append(call.seconds)
    return [
        {"component": component, "what": what, "dims": dict(dims), "seconds": seconds}
        for (component, what, dims), seconds in groups.items()
    ]
