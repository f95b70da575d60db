"""What a server is told when it starts. Every default of serving is a field's default here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..engine.request import MAX_SIDE

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    body        bytes
    pixels      of one picture that is made
    given       pixels of one picture that is handed in
    pictures    made, in one request
    steps       levels of noise
    prompt      characters
    """

    body: int = 64 * MIB
    pixels: int = 1536 * 1536
    given: int = MAX_SIDE * MAX_SIDE
    pictures: int = 16
    steps: int = 150
    prompt: int = 20_000


@dataclass(frozen=True)
class Engine:
    """How a worker opens its models: the keyword arguments of `sdengine.load`."""

    backend: str = "auto"
    precision: str | None = None
    threads: int | None = None
    preset: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Config:
    """models     name -> bundle folder; the first is the one that is meant where none is named
    tokens      who may ask: `token`, or `user:password`; empty: everybody who can reach the port
    host, port  where it listens
    queue       requests that may wait; one more is answered 429
    workers     processes with an engine of their own
    devices     what they run on, in turn; empty: what the backend takes itself
    batch       pictures of several requests in one network call; None: measured at the start
    memory      bytes that a worker may hold; models that were not used for longest are closed
    deadline_s  from the request's arrival to its last picture
    hang_s      without a step, after which a worker counts as hung
    open_s      the same while it opens a model, before a run's first step and after its last
    grace_s     for what runs and waits when the server is told to stop
    keep_s, keep_bytes   how long, and how many, pictures of finished jobs are kept to be fetched
    """

    models: Mapping[str, Path]
    tokens: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    queue: int = 64
    workers: int = 1
    devices: tuple[str, ...] = ()
    batch: int | None = None
    memory: int | None = None
    deadline_s: float = 600.0
    hang_s: float = 120.0
    open_s: float = 900.0
    grace_s: float = 30.0
    keep_s: float = 3600.0
    keep_bytes: int = 256 * MIB
    ui: bool = False
    limits: Limits = field(default_factory=Limits)
    engine: Engine = field(default_factory=Engine)

    def of_worker(self, number: int) -> Config:
        """As the worker of this number has it: with a device of its own."""
        if not self.devices:
            return self
        device = self.devices[number % len(self.devices)]
        return replace(self, engine=replace(self.engine, device=device))

    @property
    def default_model(self) -> str:
        return next(iter(self.models))
