"""What is asked for, and what comes back. Every default of a run is a field's default here."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from . import schedule, solvers
from .errors import RequestError, UnknownName

SEED_END = 2**32
MIN_SIDE, MAX_SIDE = 16, 4096


@dataclass(frozen=True)
class Request:
    """One run: `count` pictures of one prompt.

    prompt, negative_prompt   text; empty is legal
    width, height   pixels, 16..4096; None takes the model's native size
    steps           1..1000
    guidance        scale of classifier-free guidance; 1 turns it off, 0 ignores the prompt
    sampler         a name of engine.solvers.SOLVERS
    schedule        a name of engine.schedule.SCHEDULES; None takes the sampler's own
    eta             0..1, for samplers that take one: 0 deterministic, 1 ancestral
    seed            0..2^32-1 of the first picture, the next ones count up; None draws one
    count           pictures, 1..10000
    batch_size      pictures in one network call, 1..64

    raises          RequestError, UnknownName
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 25
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    eta: float = 0.0
    seed: int | None = None
    count: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(
                    f"{name} is {type(getattr(self, name)).__name__}, not text",
                    hint=f"give {name} as a str; bytes must be decoded first",
                )
        for name, low, high in _WHOLE:
            _check_whole(name, getattr(self, name), low, high)
        for name, least, most in _REAL:
            _check_real(name, getattr(self, name), least, most)
        if self.seed is not None and self.seed + self.count > SEED_END:
            raise RequestError(
                f"seed {self.seed} and {self.count} pictures reach past seed {SEED_END - 1}",
                hint=f"take a seed of at most {SEED_END - self.count}, or fewer pictures",
            )
        solvers.find(self.sampler)
        if self.schedule is not None and self.schedule not in schedule.SCHEDULES:
            raise UnknownName("schedule", self.schedule, schedule.SCHEDULES)
        if self.eta != 0.0 and not solvers.find(self.sampler).eta:
            solvers.refuse_eta(self.sampler, self.eta)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """From a picture's metadata or a JSON line; an unknown key is an error."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise UnknownName("request field", name, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def completed(self, native_size: tuple[int, int]) -> Request:
        """Nothing left open: the model's size, the sampler's schedule, a drawn seed."""
        height, width = native_size
        own = solvers.find(self.sampler).schedule
        return replace(
            self,
            width=width if self.width is None else self.width,
            height=height if self.height is None else self.height,
            schedule=own if self.schedule is None else self.schedule,
            seed=secrets.randbelow(SEED_END - self.count) if self.seed is None else self.seed,
        )

    def seed_of(self, index: int) -> int:
        """The seed of picture number `index` of a completed request."""
        assert self.seed is not None
        return self.seed + index


_WHOLE = (
    ("width", MIN_SIDE, MAX_SIDE),
    ("height", MIN_SIDE, MAX_SIDE),
    ("steps", 1, 1000),
    ("seed", 0, SEED_END - 1),
    ("count", 1, 10_000),
    ("batch_size", 1, 64),
)
_REAL = (("guidance", -100.0, 100.0), ("eta", 0.0, 1.0))


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None and name in ("width", "height", "seed"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            f"{name} is {value!r}, not a whole number", hint=f"give {name} as {low} to {high}"
        )
    if not low <= value <= high:
        raise RequestError(
            f"{name} is {value}; it must lie in {low} to {high}",
            hint=f"give {name} a value in that range",
        )


def _check_real(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(
            f"{name} is {value!r}; it must be a number from {low:g} to {high:g}",
            hint=f"give {name} a value in that range",
        )


@dataclass(frozen=True)
class Progress:
    """Where a run is: handed to `on_step` after each network call."""

    picture: int
    pictures: int
    step: int
    steps: int
    seconds: float


@dataclass
class Timings:
    """Seconds of one run. `engine` is spent inside sessions, `load` opening them."""

    load: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    engine: float = 0.0
    rows: list[float] = field(default_factory=list)

    @property
    def own(self) -> float:
        """Seconds outside sessions: what the runtime itself costs."""
        return self.total - self.engine - self.load
