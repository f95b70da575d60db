"""A job: one client's request on its way through the queue and a worker.

What happens to it is a list of events that only grows; readers follow it at their own pace, and a
slow one holds nobody up. All of this lives in the server's event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, Literal

from ..engine.errors import Cancelled, SdengineError
from ..engine.request import Request
from .asks import Ask, Made

State = Literal["queued", "running", "done", "failed", "cancelled"]
Wish = Literal["", "skip", "interrupt"]


@dataclass(frozen=True)
class Event:
    """kind     queued, started, step, picture, done, failed, cancelled; the last three end a job"""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rough:
    """A small picture of what the network takes the result for; RGB, 1/factor of its size."""

    width: int
    height: int
    pixels: bytes
    factor: int = 1


class Job:
    """parts        the network runs that it takes; `part` is the one that is next, or runs
    made            pictures so far
    attempts        workers that it was given to
    wish            what its client wants of the part that runs
    """

    def __init__(self, ask: Ask, on_end: Callable[[Job], None] | None = None) -> None:
        self.id = secrets.token_hex(12)
        self.ask = ask.seeded()
        self.parts: list[Request] = self.ask.parts()
        self.part = 0
        self.made: list[Made] = []
        self.warnings: list[str] = []
        self.error: SdengineError | None = None
        self.state: State = "queued"
        self.wish: Wish = ""
        self.interrupted = False
        self.attempts = 0
        self.step, self.steps = 0, 0
        self.rough: Rough | None = None
        self.asked_at, self.asked = time(), monotonic()
        self.begun: float | None = None
        self.ended: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.events: list[Event] = []
        self._changed = asyncio.Event()
        self._on_end = on_end
        self.tell("queued")

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """0..1, of all its network calls."""
        if self.state == "done":
            return 1.0
        inside = self.step / self.steps if self.steps else 0.0
        return min((self.part + inside) / len(self.parts), 1.0)

    def tell(self, kind: str, **fields: Any) -> None:
        self.events.append(Event(kind, fields))
        self._changed.set()
        self._changed = asyncio.Event()

    def start(self) -> None:
        self.state = "running"
        self.begun = monotonic() if self.begun is None else self.begun
        self.attempts += 1
        self.tell("started", attempt=self.attempts)

    def stepped(self, step: int, steps: int, rough: Rough | None) -> None:
        self.step, self.steps, self.rough = step, steps, rough
        self.tell("step", part=self.part, parts=len(self.parts), step=step, steps=steps,
                  progress=self.progress)  # fmt: skip

    def add(self, made: Made) -> None:
        self.made.append(made)
        self.tell("picture", index=len(self.made) - 1, width=made.width, height=made.height,
                  seed=made.request.seed)  # fmt: skip

    def next_part(self) -> None:
        self.part += 1
        self.step, self.wish = 0, ""

    def finish(self) -> None:
        self._end("done", pictures=len(self.made))

    def fail(self, error: SdengineError) -> None:
        self.error = error
        kind: State = "cancelled" if isinstance(error, Cancelled) else "failed"
        self._end(kind, error=type(error).__name__, message=error.message, hint=error.hint)

    def cancel(self) -> None:
        self.fail(Cancelled("the request was called off", hint="ask again if it was by mistake"))

    def _end(self, state: State, **fields: Any) -> None:
        if self.over:
            return
        self.state, self.ended, self.rough = state, monotonic(), None
        self.tell(state, **fields)
        if self._on_end is not None:
            self._on_end(self)

    async def follow(self, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """(number, event) from number `after` on, until the job is over."""
        while True:
            changed = self._changed
            while after < len(self.events):
                yield after, self.events[after]
                after += 1
            if self.over and after >= len(self.events):
                return
            await changed.wait()

    async def result(self) -> list[Made]:
        """Its pictures, when all are made. Raises what it failed with."""
        while not self.over:
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        return self.made
