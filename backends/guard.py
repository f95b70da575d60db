"""The check of what is handed to a session: names, dtypes, shapes, and what is said if wrong.

A right call costs about a microsecond an input: everything is prepared when the session is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from ..engine.errors import FeedMismatch
from ..engine.ports import Array, Handle
from ..engine.spec import ComponentSpec, Dim, Profile, TensorSpec

_ARRAYS = (np.ndarray, Handle)


class Guard:
    """What one session takes.

    held    names of the inputs that are fixed already
    sizes   named dimensions that the held inputs or the profile fix
    """

    def __init__(
        self,
        spec: ComponentSpec,
        profile: Profile,
        held: Collection[str] = (),
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        fixed = {**profile.dims, **({} if sizes is None else sizes)}
        self._component = spec.name
        self._label = profile.label()
        self._held = frozenset(held)
        self.open = tuple(
            TensorSpec(t.name, t.dtype, tuple(_size(d, fixed) for d in t.shape))
            for t in spec.inputs
            if t.name not in held
        )
        self._names = tuple(t.name for t in self.open)
        self._expected = tuple((t.name, np.dtype(t.dtype), t.shape) for t in self.open)
        self._static = not any(isinstance(d, str) for t in self.open for d in t.shape)

    def check(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The feeds of a call, each C-contiguous. Raises FeedMismatch."""
        if len(feeds) != len(self._names):
            self._refuse_names(feeds)
        for name, dtype, shape in self._expected:
            value = feeds.get(name)
            if not isinstance(value, _ARRAYS) or value.dtype != dtype or value.shape != shape:
                self._look_closer(name, feeds)
                assert value is not None, "a missing input does not pass the closer look"
            if isinstance(value, np.ndarray) and not value.flags.c_contiguous:
                feeds = {**feeds, name: np.ascontiguousarray(value)}
        if not self._static:
            self._sizes_agree(feeds)
        return feeds

    def check_some(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """Feeds that are to be held, some of those that the session takes: the sizes they fix."""
        for name in feeds:
            self._look_closer(name, feeds)
        return self._sizes_agree(feeds)

    def _look_closer(self, name: str, feeds: Mapping[str, Any]) -> None:
        """One input in full: free dimensions fit any size, all else must be equal."""
        if name not in self._names or name not in feeds:
            self._refuse_names(feeds)
        wanted, value = self.open[self._names.index(name)], feeds[name]
        who = f"{self._component}: input {name!r}"
        if not isinstance(value, _ARRAYS):
            raise FeedMismatch(
                f"{who} is a {type(value).__name__}, not a numpy array",
                hint=f"np.asarray(value, dtype=np.{wanted.dtype}) makes one",
            )
        if value.dtype != np.dtype(wanted.dtype):
            raise FeedMismatch(
                f"{who} is {value.dtype}, expected {wanted.dtype}",
                hint=f"convert it with .astype(np.{wanted.dtype}): a backend never casts",
            )
        if len(value.shape) != len(wanted.shape) or any(
            isinstance(w, int) and f != w for f, w in zip(value.shape, wanted.shape, strict=True)
        ):
            raise FeedMismatch(
                f"{who} has shape {_list(value.shape)}, expected {_list(wanted.shape)}",
                hint=f"this session was made for {self._label}: load one with a Profile of these "
                "sizes; a dimension that its dims leave out stays free",
            )

    def _sizes_agree(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """The named dimensions of these feeds: each has one size, and at least 1."""
        seen: dict[str, tuple[int, str]] = {}
        for tensor in self.open:
            if tensor.name not in feeds:
                continue
            for dim, size in zip(tensor.shape, feeds[tensor.name].shape, strict=True):
                if isinstance(dim, int):
                    continue
                first, where = seen.setdefault(dim, (size, tensor.name))
                if first == size and size > 0:
                    continue
                found = f"{first} in {where!r}"
                found += f" and {size} in {tensor.name!r}" if first != size else ""
                raise FeedMismatch(
                    f"{self._component}: dimension {dim} is {found}",
                    hint=f"it must be 1 or more, and the same everywhere: {self._takes()}",
                )
        return {dim: size for dim, (size, _) in seen.items()}

    def _refuse_names(self, feeds: Mapping[str, Any]) -> NoReturn:
        unknown = next((n for n in feeds if n not in self._names), None)
        if unknown in self._held:
            raise FeedMismatch(
                f"{self._component}: input {unknown!r} is held fixed by bind",
                hint="leave it out, or use the session that this one was bound from",
            )
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self._names, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise FeedMismatch(
                f"{self._component}: unknown input {unknown!r}", hint=f"{meant}{self._takes()}"
            )
        missing = ", ".join(repr(n) for n in self._names if n not in feeds)
        given = ", ".join(feeds) if feeds else "nothing"
        raise FeedMismatch(
            f"{self._component}: input {missing} is missing; given: {given}",
            hint=self._takes(),
        )

    def _takes(self) -> str:
        return f"it takes {', '.join(map(str, self.open)) if self.open else 'no further input'}"


def _size(dim: Dim, fixed: Mapping[str, int]) -> Dim:
    return fixed.get(dim, dim) if isinstance(dim, str) else dim


def _list(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
