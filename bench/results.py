"""The results file: JSON, the truth that every table and plot is made from.

    {"format": 1, "complete": false, "conditions": {...}, "rates": [...], "rows": [...]}

It is written whole after every row, beside itself and then renamed: whenever a run ends, what lies
there is valid, and `complete` says whether all rows are in it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError, StorageError

FORMAT = 1
Row = dict[str, Any]


@dataclass
class Results:
    """rows      as run.py describes them: {"name", "case", "ok", ...}
    rates       as ceiling.Rate.to_dict
    ratios      of interleaved runs, as interleave.py describes them
    """

    conditions: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    rates: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self)}

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row["name"] == name), None)


def save(results: Results, path: Path) -> None:
    """Raises StorageError."""
    text = json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n"
    write(path, text)


def write(path: Path, text: str) -> None:
    """A whole file or none. Raises StorageError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise StorageError(
            f"{path} cannot be written: {error.strerror}",
            hint="name a file in a folder that you may write: --out results.json",
        ) from error


def load(path: Path) -> Results:
    """Raises RequestError: not there, not JSON, not ours, or of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read: {error.strerror}",
            hint="name a file that `sdengine bench --out FILE` wrote",
        ) from error
    except ValueError as error:
        raise RequestError(
            f"{path} is not JSON: {error}",
            hint="name a file that `sdengine bench --out FILE` wrote",
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        which = found.get("format") if isinstance(found, dict) else None
        raise RequestError(
            f"{path} holds results of format {which}, not {FORMAT}",
            hint="measure again with this version: sdengine bench --out FILE",
        )
    del found["format"]
    try:
        return Results(**found)
    except TypeError as error:
        raise RequestError(
            f"{path} is not a results file: {error}",
            hint="measure again with this version: sdengine bench --out FILE",
        ) from error
