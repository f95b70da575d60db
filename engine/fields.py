"""Checks of untrusted JSON, put together from a table: field -> kind.

A kind is a function `(value, where) -> checked value`; `where` is the path of the value inside the
file ("model.schedule.beta_start") and stands in every message. A kind raises BadManifest, or
UnsafePath for a path that could leave its folder.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import PureWindowsPath
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from .errors import BadManifest, UnsafePath

T = TypeVar("T")
Kind = Callable[[Any, str], T]

REWRITE = (
    "the file was edited, or made by another program; write the bundle again: `sdengine export`"
)


def parse(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, and no key twice. Raises BadManifest."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"not JSON: {error}", hint=REWRITE) from error


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(repr(k) for k, _ in pairs)}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def refuse(where: str, expected: str, found: Any) -> NoReturn:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise BadManifest(f"`{where}`: expected {expected}, found {shown}", hint=REWRITE)


def text(value: Any, where: str) -> str:
    """A string that is not empty and has a UTF-8 form (JSON can spell half a surrogate pair)."""
    if not isinstance(value, str) or not value:
        refuse(where, "a text", value)
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        refuse(where, "a text without lone surrogates", value)
    return value


def matching(pattern: str, meaning: str) -> Kind[str]:
    compiled = re.compile(pattern)

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            refuse(where, meaning, value)
        return value

    return check


def one_of(*names: str) -> Kind[Any]:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in names:
            refuse(where, " or ".join(repr(n) for n in names), value)
        return value

    return check


def integer(low: int, high: int = 2**53) -> Kind[int]:
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            refuse(where, f"a whole number from {low} to {high}", value)
        return value

    return check


def boolean(value: Any, where: str) -> bool:
    if type(value) is not bool:
        refuse(where, "true or false", value)
    return value


def number(low: float = -math.inf, high: float = math.inf) -> Kind[float]:
    """Finite; an integer is taken as a float."""

    def check(value: Any, where: str) -> float:
        fits = type(value) in (int, float) and low <= value <= high and abs(value) <= _LARGEST
        if not fits:
            refuse(where, f"a number from {low} to {high}", value)
        return float(value)

    return check


_LARGEST = 1.7976931348623157e308  # of float64: keeps out infinity and integers beyond it


def or_null(kind: Kind[T]) -> Kind[T | None]:
    return lambda value, where: None if value is None else kind(value, where)


def sequence(kind: Kind[T], *, low: int = 0, high: int | None = None) -> Kind[tuple[T, ...]]:
    def check(value: Any, where: str) -> tuple[T, ...]:
        span = f"{low}" if low == high else f"at least {low}"
        top = math.inf if high is None else high
        if not isinstance(value, list) or not low <= len(value) <= top:
            refuse(where, f"a list of {span} entries", value)
        return tuple(kind(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def mapping(key: Kind[str], kind: Kind[T], *, low: int = 0) -> Kind[Mapping[str, T]]:
    """An object whose keys are names, not fields."""

    def check(value: Any, where: str) -> Mapping[str, T]:
        if not isinstance(value, dict) or len(value) < low:
            refuse(where, f"an object of at least {low} entries", value)
        return MappingProxyType(
            {key(k, f"{where}, a key"): kind(v, f"{where}.{k}") for k, v in value.items()}
        )

    return check


def record(
    make: Callable[..., T],
    fields: Mapping[str, Kind[Any]],
    optional: Mapping[str, Kind[Any]] = MappingProxyType({}),
) -> Kind[T]:
    """An object with exactly these fields, handed to `make` by name."""
    kinds = {**fields, **optional}

    def check(value: Any, where: str) -> T:
        if not isinstance(value, dict):
            refuse(where, f"an object with {', '.join(kinds)}", value)
        if missing := [k for k in fields if k not in value]:
            refuse(where, f"the key{'s' * (len(missing) > 1)} {', '.join(missing)}", list(value))
        if unknown := [k for k in value if k not in kinds]:
            raise BadManifest(
                f"`{where}`: unknown key {unknown[0]!r}; known: {', '.join(kinds)}",
                hint=_nearest(unknown[0], kinds) + REWRITE,
            )
        prefix = f"{where}." if where != ROOT else ""
        return make(**{k: kinds[k](v, prefix + k) for k, v in value.items()})

    return check


ROOT = "manifest"


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? Otherwise " if near else ""


def path(value: Any, where: str) -> str:
    """A relative path with forward slashes whose every part goes down. Raises UnsafePath."""
    name = text(value, where)
    parts = name.split("/")
    windows = PureWindowsPath(name)
    unsafe = (
        "\\" in name
        or "\0" in name
        or bool(windows.drive or windows.root)
        or any(part in ("", ".", "..") for part in parts)
    )
    if unsafe:
        raise UnsafePath(
            f"`{where}`: {name!r} is not a plain path inside the bundle "
            "(relative, forward slashes, no '.' or '..')",
            hint="do not use a bundle of unknown origin; export the model again",
        )
    return name
