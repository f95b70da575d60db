"""How far a network is from what the machine can do: its operations over its time, over the rate of
a matrix product measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..engine.errors import SdengineError
from . import flops
from .results import Results, Row

Count = Callable[[str, tuple[tuple[str, int], ...]], int]

# The graph that a kind of call runs: `bind` computes what hangs on the text alone.
GRAPHS = {"run": "full", "bind": "prologue"}


@cache
def count(path: str, dims: tuple[tuple[str, int], ...]) -> int:
    return flops.count(Path(path), dict(dims)).flop


def attach(row: Row, results: Results, counter: Count = count) -> None:
    """Put flop, flops (a second) and share of the rate into each of a row's components.

    flop is that of the graph as it was traced: what an engine spares (OpenVINO computes the start
    of guided rows once, 2.7 % of a 512x512 step) counts as done, for engines to be compared.
    A share is missing where the rate is not known, an operation count where the graph has none; the
    results' notes say why.
    """
    if not row["ok"]:
        return
    rate = find(results.rates, row["about"]["precision"], row["case"]["load"].get("threads"))
    for part in row["components"]:
        path = results.model["graphs"].get(part["component"], {}).get(GRAPHS[part["what"]])
        if path is None:
            continue
        try:
            part["flop"] = counter(path, tuple(sorted(part["dims"].items())))
        except SdengineError as error:
            note = f"{part['component']}: {error.message} ({error.hint})"
            results.notes += [] if note in results.notes else [note]
            continue
        part["flops"] = part["flop"] / part["seconds"]["median"]
        if rate is not None:
            part["share"] = part["flops"] / rate


def find(rates: Sequence[Mapping[str, Any]], precision: str, threads: int | None) -> float | None:
    """The best rate measured for a precision and a wish for threads (None: the machine's own)."""
    return max(
        (r["flops"] for r in rates if (r["precision"], r["asked"]) == (precision, threads)),
        default=None,
    )
