"""The seams: what the engine asks of a backend, and nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .spec import Component, ComponentSpec, Precision, Profile
from .table import Row, Table

Array = NDArray[Any]
Floats = NDArray[np.float32]
Half = Literal["both", "uncond", "cond"]


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run on this machine.

    reason       why not, or what it runs on ("OpenVINO 2026.4 on CPU, 2 threads")
    mend         the command that would make it run; empty when it can, or when nothing would
    precisions   what it can compute in here, fastest first
    speed        rank among backends that can run; higher is faster (see backends.choose)
    trusted      of the precisions, those that need no proof in the bundle: a device's own
    """

    ok: bool
    reason: str
    mend: str = ""
    precisions: tuple[Precision, ...] = ()
    speed: int = 0
    trusted: tuple[Precision, ...] = ()


class Handle(ABC):
    """An array in a backend's own memory, which a caller only passes on: cached deep features.

    np.asarray(handle) fetches it; handle[rows] is a part of it, still there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def __getitem__(self, rows: slice) -> Handle: ...

    @abstractmethod
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array: ...


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

    def probe_on(self, device: str) -> Probe:
        """As `probe`, for one of its devices by name. Raises UnknownName, nothing else."""
        ...

    def load(self, component: Component, profile: Profile) -> Session:
        """Compile or open one network. Raises BackendError."""
        ...


class Open(Protocol):
    """Where a network comes from. paired: see Profile."""

    def __call__(
        self, component: str, dims: Mapping[str, int], *, paired: bool = False
    ) -> Session: ...


class Sessions(Open, Protocol):
    """Where a pipeline gets its networks: compiled for the asked shapes, kept for the next call."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class State:
    """Where a run is between two rows: all that its next rows need, and the caller's to keep.

    rows        how many rows are done
    x           the latent [B, C, h, w]
    history     [2 * depth, x.size]: the last x and outputs, as the loop's rings hold them
    """

    rows: int
    x: Array
    history: Array

    @classmethod
    def fresh(cls, table: Table, x: Array) -> State:
        return cls(0, x, np.zeros((2 * table.depth, x.size), x.dtype))


class Step(Protocol):
    """What one row did. Arrays of a device are fetched when they are read, and only then.

    x       the new latent [B, C, h, w]; the caller's to keep
    before  the latent that the network was given
    out     what the network answered (guided)
    """

    @property
    def row(self) -> Row: ...
    @property
    def x(self) -> Array: ...
    @property
    def before(self) -> Array: ...
    @property
    def out(self) -> Array: ...

    def state(self) -> State:
        """A copy from which the run can go on; to be taken before the next step is asked for."""
        ...


@dataclass(frozen=True)
class Blend:
    """After row i, x becomes  mask x + (1 - mask) (alphas[i] latent + sigmas[i] noise).

    mask            float32 [1, h, w], 1 where x stays
    latent, noise   float32 [B, C, h, w]
    alphas, sigmas  float32 [R]
    """

    mask: Array
    latent: Array
    noise: Array
    alphas: Array
    sigmas: Array


@dataclass(frozen=True)
class Job:
    """A table to be run on a device.

    start       float32: where it begins
    halves      of a guided row, in the order of their calls: ("both",) or ("uncond", "cond"); a row
                of guidance 1 runs "cond" alone
    sessions    (half, graph) -> a session with all held but `sample`, `timestep` and cached
                features; `both` has 2B rows, unconditional first
    channels    [B, C, h, w], joined behind x in what the network is given
    noise       draws unit noise of x's shape; to be called once for each row with n != 0, in order
                and not before the row is asked for
    """

    table: Table
    start: State
    halves: tuple[Half, ...]
    sessions: Mapping[tuple[Half, str], Session]
    channels: Array | None
    noise: Callable[[], Array]
    blend: Blend | None


class Denoiser(Protocol):
    """What a backend may offer beside sessions, as `denoiser`, and Sessions may pass on: the whole
    table on the device. `engine.loop.denoise` is the reference that it must equal."""

    def __call__(self, job: Job) -> Iterator[Step] | None:
        """A Step after each row. No row waits for the one before it. None: these sessions are not
        of the kind that it runs.

        raises  NumericsError when the network answered NaN or infinity, by the end of the run;
                BackendError
        """
        ...
