"""Two results files against each other: ratios with their spread, and a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.errors import RequestError
from . import env, stats
from .results import Results, Row

METRICS = ("total_s", "step_s")


@dataclass(frozen=True)
class Change:
    """One metric of one row: how the second run's time relates to the first's (over 1: slower).

    quality     (median PSNR before, after), None where equal to the reference or unknown
    """

    row: str
    metric: str
    before: float
    after: float
    ratio: stats.Ratio
    quality: tuple[float | None, float | None]

    def slower_than(self, limit: float) -> bool:
        """Over the limit, and the interval lies over 1: not noise alone."""
        return self.ratio.median > limit and self.ratio.low > 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio.to_dict(), "quality": list(self.quality)}


@dataclass(frozen=True)
class Comparison:
    """changes     of rows that ran in both
    only        rows that one of them lacks or in which they failed, with the reason
    conditions  those that differ
    """

    changes: list[Change]
    only: dict[str, str]
    conditions: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": [change.to_dict() for change in self.changes],
            "only": self.only,
            "conditions": self.conditions,
        }


def compare(before: Results, after: Results) -> Comparison:
    """Raises RequestError when no row ran in both."""
    changes: list[Change] = []
    only: dict[str, str] = {}
    for name in dict.fromkeys(row["name"] for row in (*before.rows, *after.rows)):
        first, second = before.row(name), after.row(name)
        why = _missing(first, "the first run") or _missing(second, "the second run")
        if why or first is None or second is None:
            only[name] = why
        else:
            changes += _changes(name, first, second)
    if not changes:
        raise RequestError(
            "the two runs have no row in common",
            hint=f"the first has {_names(before)}; the second {_names(after)}; measure both with "
            "the same --cases and --backends",
        )
    return Comparison(changes, only, env.differences(_about(before), _about(after)))


def _about(results: Results) -> dict[str, Any]:
    return {**results.conditions, "model": results.model.get("sha256")}


def _missing(row: Row | None, run: str) -> str:
    if row is None:
        return f"not in {run}"
    return "" if row["ok"] else f"failed in {run}: {row['failure']['error']}"


def _names(results: Results) -> str:
    return ", ".join(row["name"] for row in results.rows if row["ok"]) or "none that ran"


def _changes(name: str, first: Row, second: Row) -> Iterator[Change]:
    for metric in METRICS:
        a, b = first["steady"][metric], second["steady"][metric]
        if not a or not b:
            continue
        ratio = stats.ratio(a["samples"], b["samples"])
        both = (_decibels(first), _decibels(second))
        yield Change(name, metric, a["median"], b["median"], ratio, both)


def _decibels(row: Mapping[str, Any]) -> float | None:
    found = row.get("quality")
    value: float | None = None if found is None else found["psnr_db"]["median"]
    return value


def gate(comparison: Comparison, before: Results, max_slowdown: float) -> list[str]:
    """What fails: slower rows, and rows of the first run that the second cannot show."""
    failed = [
        f"{change.row} {change.metric}: {change.ratio} times as long; at most {max_slowdown:g}"
        for change in comparison.changes
        if change.slower_than(max_slowdown)
    ]
    known = {row["name"] for row in before.rows if row["ok"]}
    return failed + [f"{row}: {why}" for row, why in comparison.only.items() if row in known]


def lines(comparison: Comparison) -> Iterator[str]:
    """For people: one line a metric, ratio = second / first, 95 % interval in brackets."""
    rows = [("row", "metric", "first", "second", "ratio (95 %)", "PSNR dB")]
    for c in comparison.changes:
        decibels = " -> ".join("-" if value is None else f"{value:.1f}" for value in c.quality)
        times = (f"{c.before:.4g} s", f"{c.after:.4g} s")
        rows.append((c.row, c.metric, *times, str(c.ratio), decibels))
    yield from _columns(rows)
    for row, why in comparison.only.items():
        yield f"{row}: {why}"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
