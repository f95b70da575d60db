"""Serve on one backend while another one builds its engines, then swap.

Each network is loaded on both: on `now` at once, on `later` in a thread, whose builders work in
processes of their own. A network goes over to `later` when a prompt is bound or a call begins after
its engine is there, never in the middle of a run: what was bound stays what it was.

checked by  tests/unit/test_relay.py
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from threading import Lock, Thread

from ..engine.errors import SdengineError, SessionClosed
from ..engine.ports import Array, Backend, Denoiser, Job, Probe, Session, Step
from ..engine.spec import Component, ComponentSpec, Profile

log = logging.getLogger("sdengine.backends")


class Relay:
    """A backend made of two. It is called as the one that is waited for.

    later   what builds; its probe is this one's
    now     what serves meanwhile: in float32, on its own device
    """

    def __init__(self, later: Backend, now: Backend) -> None:
        self._later, self._now = later, now

    @property
    def name(self) -> str:
        return self._later.name

    def probe(self) -> Probe:
        return self._later.probe()

    def probe_on(self, device: str) -> Probe:
        return self._later.probe_on(device)

    def load(self, component: Component, profile: Profile) -> Session:
        """Raises what `now` raises; what `later` raises is logged, and `now` goes on serving."""
        plain = replace(profile, precision="f32", device=None)
        now = self._now.load(component, plain)
        future: Future[Session] = Future()

        def build() -> None:
            try:
                session = self._later.load(component, profile)
                for name in component.at(profile.precision).graphs:
                    if name == "full":  # several step graphs are built when they are asked for
                        session.graph(name)
                future.set_result(session)
            except Exception as error:
                future.set_exception(error)

        Thread(target=build, name=f"sdengine-build-{component.spec.name}", daemon=True).start()
        return RelaySession(component.spec.name, now, future, self._later.name)

    def denoiser(self, job: Job) -> Iterator[Step] | None:
        """That of `later`, which says None to sessions of the other."""
        offered: Denoiser | None = getattr(self._later, "denoiser", None)
        return None if offered is None else offered(job)


class RelaySession:
    """A session that becomes another one. `bind` and `graph` give views of the one it is then."""

    def __init__(self, component: str, now: Session, later: Future[Session], waited: str) -> None:
        self._component, self._now, self._later, self._waited = component, now, later, waited
        self._closed = self._told = False
        self._lock = Lock()

    @property
    def spec(self) -> ComponentSpec:
        return self._now.spec

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._current()(feeds)

    def bind(self, feeds: Mapping[str, Array]) -> Session:
        return self._current().bind(feeds)

    def graph(self, name: str) -> Session:
        return self._current().graph(name)

    def close(self) -> None:
        """Of an engine that is still being built, as soon as it is there."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._now.close()
        self._later.add_done_callback(_close)

    def _current(self) -> Session:
        if self._closed:
            raise SessionClosed(
                f"the session of {self._component} was closed",
                hint="load it again; a session ends with the pipeline that owns it",
            )
        if not self._later.done():
            return self._now
        error = self._later.exception()
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._tell(error)
        return self._now if error is not None else self._later.result()

    def _tell(self, error: BaseException | None) -> None:
        if error is None:
            log.info("%s: %s is built, and takes over", self._component, self._waited)
            return
        said = error.message if isinstance(error, SdengineError) else str(error)
        hint = f"; {error.hint}" if isinstance(error, SdengineError) else ""
        log.warning("%s: %s could not be built: %s%s", self._component, self._waited, said, hint)


def _close(later: Future[Session]) -> None:
    if later.exception() is None:
        later.result().close()
