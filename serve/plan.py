"""What a file of requests comes to: single pictures, each with a name that its content decides.

A name says all that decides the picture: the model, the request with its seed, the content of the
pictures given, the engine that was asked for. So a picture that is there need not be made again,
wherever its line stands by now.

checked by  tests/serve/test_batch_lines.py
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..engine import tasks
from ..engine.batch import APART
from ..engine.bundle import Bundle
from ..engine.given import Given, digest
from ..engine.outputs import stem
from ..engine.request import SEED_END, Request
from ..engine.setup import set_up
from .lines import Line

DIGITS = 12  # of a name's hash: among 100,000 pictures two are alike once in 50,000 batches

ALONE = ""  # the shape of what runs on its own

_OWN = {f.name: f.default for f in fields(Request)}
_NOT_THE_PICTURE = ("count", "batch_size", "solver")  # of a solver's file its content counts


@dataclass(frozen=True)
class Item:
    """One picture. `request` makes it alone; `batch_size` is what its line allows."""

    line: int
    request: Request
    pictures: Mapping[str, list[str] | str]
    name: str
    batch_size: int

    def follows(self, other: Item) -> bool:
        """Whether it is the next of the same line: one run makes both."""
        return self.line == other.line and self.request == _next(other.request)


@dataclass(frozen=True)
class Job:
    """Pictures that one run makes: of one line, their seeds one after another.

    together    of several lines, which differ in words and seeds alone: one network call for all
    """

    items: tuple[Item, ...]
    together: bool = False

    @property
    def requests(self) -> list[Request]:
        """Of each picture on its own."""
        return [item.request for item in self.items]

    def apart(self) -> list[Job]:
        return [Job((item,)) for item in self.items]

    @property
    def request(self) -> Request:
        first, count = self.items[0], len(self.items)
        return replace(first.request, count=count, batch_size=min(count, first.batch_size))


class Checker:
    """Refuses what a model cannot run, without a network: lines that differ in words and seed alone
    are looked at once. `accepted` holds what was found good."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._accepted: set[str] = set()

    def __call__(self, line: Line) -> None:
        """Raises RequestError, StorageError."""
        plain = replace(line.request, prompt="", negative_prompt="", seed=0, count=1)
        key = json.dumps([plain.to_dict(), line.pictures], sort_keys=True)
        if key in self._accepted:
            return
        facts, given = self._bundle.facts, Given.take(dict(line.pictures))
        task = tasks.choose(facts, line.request.task, given)
        completed = plain.completed(task.name, None if task.placed else facts.native_size)
        set_up(task, self._bundle, completed, given, None)
        self._accepted.add(key)


def items(
    lines: Iterable[Line], model: str, how: Mapping[str, Any], suffix: str = ".png"
) -> list[Item]:
    """Every picture of these lines, once, in their order.

    model       id of the bundle
    how         backend and precision, where they are asked for by name
    suffix      of the files

    A line without a seed gets one from its content, and from how many lines before it say the same:
    the same at each start, and no two lines share a picture by chance.
    """
    seen: Counter[str] = Counter()
    content = functools.cache(lambda path: digest(Path(path)))
    made: dict[str, Item] = {}
    for line in lines:
        request = line.request
        files = dict(line.pictures) | ({} if request.solver is None else {"solver": request.solver})
        about = [model, how, _contents(files, content)]
        if request.seed is None:
            text = json.dumps([*about, _said(request)], sort_keys=True)
            request = replace(request, seed=_seed(f"{seen[text]} {text}", request.count))
            seen[text] += 1
        for k in range(request.count):
            own = request.own(k)
            key = hashlib.sha256(json.dumps([*about, _said(own)], sort_keys=True).encode())
            name = f"{stem(own.prompt)}.{own.seed}.{key.hexdigest()[:DIGITS]}{suffix}"
            item = Item(line.number, own, line.pictures, name, request.batch_size)
            made.setdefault(name, item)
    return list(made.values())


def jobs(
    wanted: Sequence[Item],
    done: Container[str] = (),
    most: int | None = None,
    together: int = 1,
) -> list[Job]:
    """The runs that make what is not done, in the order in which each begins.

    done        names
    most        pictures of one run; None: as many as follow each other
    together    pictures of one network call: lines that differ in words and seeds alone share it.
                What is left of a shape, being fewer, runs on its own: one size is compiled
    """
    missing = [item for item in wanted if item.name not in done]
    if together == 1:
        return _neighbours(missing, most)
    shapes: dict[str, list[Item]] = {}
    for item in missing:
        shapes.setdefault(_shape(item), []).append(item)
    found, rest = [], []
    for key, group in shapes.items():
        whole = 0 if key == ALONE else len(group) // together * together
        found += [Job(tuple(group[k : k + together]), True) for k in range(0, whole, together)]
        rest += group[whole:]
    place = {item.name: k for k, item in enumerate(wanted)}
    rest.sort(key=lambda item: place[item.name])
    found += _neighbours(rest, most)
    return sorted(found, key=lambda job: place[job.items[0].name])


def _neighbours(missing: Sequence[Item], most: int | None) -> list[Job]:
    found: list[list[Item]] = []
    for item in missing:
        room = item.batch_size if most is None else min(item.batch_size, most)
        full = most is not None and bool(found) and len(found[-1]) >= room
        if found and not full and item.follows(found[-1][-1]):
            found[-1].append(item)
        else:
            found.append([item])
    return [Job(tuple(group)) for group in found]


def _shape(item: Item) -> str:
    """Equal for pictures that one network call may make; ALONE where it may not."""
    if item.pictures or item.request.long_prompt or item.batch_size > 1:
        return ALONE
    fields = item.request.to_dict()
    return json.dumps([fields[name] for name in sorted(fields) if name not in APART])


def _next(request: Request) -> Request:
    assert request.seed is not None
    if request.variation_seed is not None:
        return replace(request, variation_seed=request.variation_seed + 1)
    return replace(request, seed=min(request.seed + 1, SEED_END - 1))


def _said(request: Request) -> dict[str, Any]:
    """The fields that decide a picture and are not at their default: what a later version adds
    changes no name."""
    return {
        name: value
        for name, value in request.to_dict().items()
        if name not in _NOT_THE_PICTURE and value != _OWN[name]
    }


def _contents(
    pictures: Mapping[str, list[str] | str], content: Callable[[str], str]
) -> dict[str, list[str]]:
    return {
        name: [content(path) for path in (value if isinstance(value, list) else [value])]
        for name, value in pictures.items()
    }


def _seed(text: str, count: int) -> int:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number % (SEED_END - count)
