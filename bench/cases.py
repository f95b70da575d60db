"""What is measured: cases by name, and the rows that they make with backends and precisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..engine.errors import UnknownName
from ..engine.request import Request

# Fields of a request by name; what is not here is the request's own default.
CASES: Mapping[str, Mapping[str, Any]] = {
    "picture": {},
    "ddim20": {"sampler": "ddim", "steps": 20},
    "short": {"steps": 8},
    "unguided": {"guidance": 1.0},
    "batch": {"count": 4, "batch_size": 4},
}
DEFAULT_CASES = ("picture",)
PROMPTS = ("a slice of pizza", "a fox", "an astronaut", "a red heart")
SEED = 20261123

# Ways to be fast that change the picture; a reference does without them.
SPEED_FIELDS = ("preset",)
REFERENCE_PRECISION = "f32"


@dataclass(frozen=True)
class Case:
    """One row to measure.

    name        unique in a run; rows of two runs are compared by it
    request     fields of a Request, without its prompt
    load        keyword arguments of sdengine.load
    prompts     run in turn, all with one seed; quality is measured on all of them
    runs        steady pictures that are timed, after `warmups` that are not
    refused     why it cannot run here, found before it was tried; "" when nothing is known
    hint        the next step then
    """

    name: str
    request: Mapping[str, Any]
    load: Mapping[str, Any]
    prompts: tuple[str, ...] = PROMPTS
    runs: int = 5
    warmups: int = 1
    refused: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what was refused stands in the row's failure."""
        plain = {**asdict(self), "prompts": list(self.prompts)}
        return {k: v for k, v in plain.items() if k not in ("refused", "hint")}


def reference(case: Case, backend: str) -> Case:
    """The float32 run that a case's pictures are compared with: same prompts, seed and steps."""
    plain = {k: v for k, v in case.request.items() if k not in SPEED_FIELDS}
    load = {**case.load, "backend": backend, "precision": REFERENCE_PRECISION}
    label = case.name.partition("/")[0].partition("+")[0]
    name = f"{label}/{backend}-{REFERENCE_PRECISION}{_threads(load.get('threads'))}"
    return Case(name, plain, load, case.prompts, case.runs, case.warmups)


@dataclass(frozen=True)
class Wish:
    """What the user asks to be measured; rows are all combinations.

    overrides   fields of a Request that stand over every case's own: width, steps, ...
    precisions  None: all that a backend has and the bundle has proved
    """

    model: str
    backends: tuple[str, ...]
    cases: tuple[str, ...] = DEFAULT_CASES
    overrides: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] | None = None
    threads: tuple[int | None, ...] = (None,)
    prompts: tuple[str, ...] = PROMPTS
    runs: int = 5
    warmups: int = 1

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in CASES:
                raise UnknownName("case", name, CASES)
        for name in self.cases:
            Request.from_dict({"seed": SEED, **CASES[name], **self.overrides})  # its own checks


def rows(wish: Wish, able: Mapping[str, Mapping[str, Any]]) -> Iterator[Case]:
    """The rows of a wish. `able`: what the worker's `plan` says of each backend; one that cannot
    run here is a row with its reason."""
    for name in wish.cases:
        request = {"seed": SEED, **CASES[name], **wish.overrides}
        for backend in wish.backends:
            found = able[backend]
            for precision in _precisions(wish.precisions, found):
                for threads in wish.threads:
                    how = {"model": wish.model, "backend": backend, "precision": precision}
                    label = "-".join(p for p in (backend, precision) if p)
                    yield Case(
                        f"{name}/{label}{_threads(threads)}",
                        request,
                        {**how, **({} if threads is None else {"threads": threads})},
                        wish.prompts,
                        wish.runs,
                        wish.warmups,
                        "" if found["ok"] else found["reason"],
                        "" if found["ok"] else found["mend"],
                    )


def _precisions(asked: Sequence[str] | None, found: Mapping[str, Any]) -> Iterable[str | None]:
    if asked is not None:
        return asked
    return found["precisions"] if found["ok"] else (None,)


def _threads(count: int | None) -> str:
    return "" if count is None else f"-t{count}"
