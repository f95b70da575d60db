"""A file of requests, one JSON value a line, read and checked whole before anything runs.

A line is an object with fields of engine.request.Request, and `image` (a path or a list of paths),
`mask` and `depth` beside them; or a string, which is a prompt alone. Paths are relative to the
file. Blank lines are skipped.

checked by  tests/serve/test_batch_lines.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import RequestError, SdengineError, StorageError
from ..engine.fields import parse
from ..engine.given import KINDS
from ..engine.request import Request

SHOWN = 10  # bad lines that a message lists


@dataclass(frozen=True)
class Line:
    """number      in the file, from 1
    pictures    image, mask, depth: what a pipeline takes beside the request; absolute paths
    """

    number: int
    request: Request
    pictures: Mapping[str, list[str] | str]


@dataclass(frozen=True)
class Bad:
    """A line that cannot be run, and why."""

    number: int
    error: SdengineError

    def text(self) -> str:
        return f"line {self.number}: {self.error.message} ({self.error.hint})"


@dataclass(frozen=True)
class Lines:
    good: list[Line]
    bad: list[Bad]


Check = Callable[[Line], None]


def read(path: Path, common: Mapping[str, Any] | None = None, check: Check | None = None) -> Lines:
    """Every line of the file, good or bad.

    common      fields that hold for every line that does not give them itself
    check       raises an SdengineError for a line that the model cannot run
    raises      StorageError when the file cannot be read; RequestError when it holds no line
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check the path and that you may read the file",
        ) from None
    good: list[Line] = []
    bad: list[Bad] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found = _line(number, line, {} if common is None else common, path.parent)
            if check is not None:
                check(found)
            good.append(found)
        except SdengineError as error:
            bad.append(Bad(number, error))
    if not good and not bad:
        raise RequestError(
            f"{path} holds no request",
            hint='write one a line: {"prompt": "a red fox", "seed": 7}, or "a red fox"',
        )
    return Lines(good, bad)


def refuse(path: Path, bad: list[Bad]) -> RequestError:
    """All bad lines in one error."""
    shown = [f"  {one.text()}" for one in bad[:SHOWN]]
    if len(bad) > SHOWN:
        shown.append(f"  and {len(bad) - SHOWN} more")
    count = "one line" if len(bad) == 1 else f"{len(bad)} lines"
    return RequestError(
        "\n".join([f"{count} of {path} cannot be run:", *shown]),
        hint="mend them, or leave them out with --keep-going",
    )


def common_fields(text: str) -> dict[str, Any]:
    """The object of --common. Raises RequestError."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RequestError(f"--common is not JSON: {error}", hint=_COMMON) from None
    if not isinstance(fields, dict):
        raise RequestError(f"--common is {text}, not an object", hint=_COMMON)
    return fields


_COMMON = """give an object: --common '{"steps": 20, "width": 512}'"""
_SHAPE = 'a line is {"prompt": "a red fox", "seed": 7}, or "a red fox" alone'


def _line(number: int, raw: bytes, common: Mapping[str, Any], folder: Path) -> Line:
    try:
        value = parse(raw)
    except SdengineError as error:
        raise RequestError(error.message, hint=_SHAPE) from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise RequestError(f"{_short(value)} is no object and no text", hint=_SHAPE)
    fields = {**common, **value}
    pictures = {name: fields.pop(name) for name in KINDS if fields.get(name) is not None}
    for name in KINDS:
        fields.pop(name, None)
    placed = {name: _paths(name, value, folder) for name, value in pictures.items()}
    if isinstance(fields.get("solver"), str):
        fields["solver"] = str((folder / fields["solver"]).absolute())
    return Line(number, Request.from_dict(fields), placed)


def _paths(name: str, value: Any, folder: Path) -> list[str] | str:
    """Absolute, and there."""
    several = value if isinstance(value, list) and name == "image" else [value]
    if not several or not all(isinstance(one, str) and one for one in several):
        raise RequestError(
            f"{name} is {_short(value)}, not a path",
            hint=f"give {name} as a path, relative to the file of requests",
        )
    found = [(folder / one).absolute() for one in several]
    for path in found:
        if not path.is_file():
            raise RequestError(
                f"there is no {name} {path}",
                hint="paths are relative to the file of requests; check the name",
            )
    return [str(path) for path in found] if name == "image" else str(found[0])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
