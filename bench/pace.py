"""How often each of an interleaved run takes its turn, and how long its turns are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.errors import RequestError, UnknownName


@dataclass(frozen=True)
class Pace:
    """rounds      turns of each peer; ours run before, between and after all turns of peers
    turns       other numbers of turns, by name: of a peer, or of a variant of ours
    steps       fewer steps than asked for, by name: the picture's time is then composed, and there
                is no warm-up: a peer so slow spends seconds on a first time, and hours on the rest
    warmups     pictures before, which do not count
    warm_steps  their steps; None: as many as the measured ones
    """

    rounds: int = 5
    turns: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    warmups: int = 1
    warm_steps: int | None = None

    def turns_of(self, peer: str) -> int:
        return self.turns.get(peer, self.rounds)

    def warmups_of(self, peer: str) -> int:
        return 0 if peer in self.steps else self.warmups

    def places(self, name: str, slots: int) -> frozenset[int]:
        """In which of the slots between turns of peers a variant of ours runs: evenly spread, the
        first and the last among them."""
        count = min(self.turns.get(name, slots), slots)
        return frozenset(np.linspace(0, slots - 1, count).round().astype(int).tolist())

    def __str__(self) -> str:
        """For a reader of the results."""
        turns = "".join(f", {name} {count}" for name, count in self.turns.items())
        few = "".join(
            f"; {name} ran {count} steps without a warm-up, and the missing ones are added at the "
            "median of these"
            for name, count in self.steps.items()
        )
        warm = "" if self.warm_steps is None else f" of {self.warm_steps} steps"
        return f"in turn, {self.rounds} rounds{turns}; {self.warmups} warm-ups{warm}{few}"


def composed(found: Mapping[str, Any], missing: int) -> dict[str, Any]:
    """A run as if it had `missing` steps more, each of the median time of its own steps.

    raises  RequestError: it told no step's time
    """
    if not missing:
        return dict(found)
    if not found["rows"]:
        raise RequestError(
            "a picture cannot be composed: the run told the time of no step",
            hint="give it one step more with --fewer: the first one's time may hold the text's",
        )
    return {**found, "seconds": found["seconds"] + missing * float(np.median(found["rows"]))}


def neighbours(peer: Sequence[int], ours: Sequence[int]) -> list[tuple[int, int]]:
    """Each turn of a peer with our nearest turns before and after it.

    peer    turn n lies between our turns n and n + 1
    ours    ascending
    """
    found = []
    for turn in peer:
        before = [n for n in ours if n <= turn][-1:]
        after = [n for n in ours if n > turn][:1]
        found += [(turn, n) for n in before + after]
    return found


def counts(option: str, text: str | None) -> dict[str, int]:
    """`exact=3,genai=2` -> the numbers by name. Raises RequestError."""
    found = {}
    for part in () if text is None else filter(None, text.split(",")):
        name, equal, count = part.strip().partition("=")
        if not (name and equal and count.isdecimal() and int(count) > 0):
            raise RequestError(
                f"{option} holds {part!r}",
                hint=f"give names with whole numbers from 1 up: {option} genai=2,exact=3",
            )
        found[name] = int(count)
    return found


def check_names(option: str, given: Mapping[str, int], known: Sequence[str]) -> None:
    """Raises UnknownName: a name that does not run."""
    for name in given:
        if name not in known:
            raise UnknownName(f"name in {option}", name, known)
