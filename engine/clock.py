"""Stage timings of one run: handed in, no global, nothing printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter

from .ports import Array, Denoiser, Job, Session, Sessions, Step
from .request import Timings
from .spec import ComponentSpec


@contextmanager
def stage(timings: Timings, name: str) -> Iterator[None]:
    """Add the block's seconds to a field of `timings`, also when it ends in an exception."""
    start = perf_counter()
    try:
        yield
    finally:
        setattr(timings, name, getattr(timings, name) + perf_counter() - start)


class Metered:
    """Sessions whose opening is counted as `load` and whose calls as `engine`."""

    def __init__(self, sessions: Sessions, timings: Timings) -> None:
        self._sessions, self._timings = sessions, timings

    def __call__(self, component: str, dims: Mapping[str, int], *, paired: bool = False) -> Session:
        with stage(self._timings, "load"):
            session = self._sessions(component, dims, paired=paired)
        return _MeteredSession(session, self._timings)

    def expect(self, component: str, dims: Mapping[str, int], graph: str, *, paired: bool) -> None:
        """Passed on to sessions that can load beside what runs; waiting for it is `load`."""
        expect = getattr(self._sessions, "expect", None)
        if expect is not None:
            expect(component, dims, graph, paired=paired)

    @property
    def denoiser(self) -> Denoiser | None:
        """What the sessions inside offer, if they do. Its work is counted as `engine`."""
        offered: Denoiser | None = getattr(self._sessions, "denoiser", None)
        return None if offered is None else partial(self._denoise, offered)

    def _denoise(self, offered: Denoiser, job: Job) -> Iterator[Step] | None:
        sessions = {k: s.inner for k, s in job.sessions.items() if isinstance(s, _MeteredSession)}
        steps = offered(replace(job, sessions=sessions))
        return None if steps is None else self._counted(steps)

    def _counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        while True:
            start = perf_counter()
            step = next(steps, None)
            self._timings.engine += perf_counter() - start
            if step is None:
                return
            yield step


class _MeteredSession:
    def __init__(self, session: Session, timings: Timings) -> None:
        self._session, self._timings = session, timings

    @property
    def inner(self) -> Session:
        return self._session

    @property
    def spec(self) -> ComponentSpec:
        return self._session.spec

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        start = perf_counter()
        result = self._session(feeds)
        self._timings.engine += perf_counter() - start
        return result

    def bind(self, feeds: Mapping[str, Array]) -> Session:
        start = perf_counter()
        bound = self._session.bind(feeds)
        self._timings.engine += perf_counter() - start
        return _MeteredSession(bound, self._timings)

    def graph(self, name: str) -> Session:
        """Counted as `load`: the graph may have to be compiled."""
        with stage(self._timings, "load"):
            return _MeteredSession(self._session.graph(name), self._timings)

    def close(self) -> None:
        self._session.close()
