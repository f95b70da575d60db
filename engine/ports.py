"""The seams: what the engine asks of a backend, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .spec import Component, ComponentSpec, Precision, Profile

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run on this machine.

    reason       why not, or what it runs on ("OpenVINO 2026.4 on CPU, 2 threads")
    mend         the command that would make it run; empty when it can, or when nothing would
    precisions   what it can compute in here, fastest first
    speed        rank among backends that can run; higher is faster (see backends.choose)
    """

    ok: bool
    reason: str
    mend: str = ""
    precisions: tuple[Precision, ...] = ()
    speed: int = 0


class Session(Protocol):
    """A loaded network: named arrays in, named arrays out."""

    @property
    def spec(self) -> ComponentSpec: ...

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Results belong to the caller. Raises FeedMismatch, SessionClosed."""
        ...

    def bind(self, feeds: Mapping[str, Array]) -> Session:
        """This session with some inputs held fixed; the call then takes the others.

        The new session shares the compiled network and is closed with it.
        """
        ...

    def graph(self, name: str) -> Session:
        """This session, what it holds included, running another graph of the network.

        The graph is compiled now, if it is not yet; `spec` says what it takes and gives.
        Raises MissingPart when the component has no such graph, BackendError.
        """
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    def probe(self) -> Probe:
        """Look, cheaply; never raise."""
        ...

    def load(self, component: Component, profile: Profile) -> Session:
        """Compile or open one network. Raises BackendError."""
        ...


class Sessions(Protocol):
    """Where a pipeline gets its networks: compiled for the asked shapes, kept for the next call."""

    def __call__(self, component: str, dims: Mapping[str, int]) -> Session: ...

    def close(self) -> None: ...
