"""The pictures that a run is given, beside its request.

A Request is plain data; these are pictures, and where they came from. What they were is written
into the result, so that a run can be repeated and a changed file be noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RequestError, StorageError
from .sources import Source

KINDS = ("image", "mask", "depth")


@dataclass(frozen=True)
class Given:
    """images, in order; a mask (white is repainted); a depth map (white is near)."""

    images: tuple[Source, ...] = ()
    mask: Source | None = None
    depth: Source | None = None

    @classmethod
    def take(cls, fields: dict[str, Any]) -> Given:
        """Take `image` (one or several), `mask` and `depth` out of keyword arguments."""
        image = fields.pop("image", ())
        images = tuple(image) if isinstance(image, (list, tuple)) else (image,)
        return cls(images, fields.pop("mask", None), fields.pop("depth", None))

    def __bool__(self) -> bool:
        return any(True for _ in self._named())

    def _named(self) -> Iterator[tuple[str, Source]]:
        for k, source in enumerate(self.images):
            yield ("image" if k == 0 else f"image {k + 1}"), source
        for name, other in (("mask", self.mask), ("depth", self.depth)):
            if other is not None:
                yield name, other

    def about(self) -> dict[str, str]:
        """`image` -> `<first 16 digits of the SHA-256 of its content> <path>`, for metadata."""
        return {name: f"{digest(s)} {_place(s)}".strip() for name, s in self._named()}

    @classmethod
    def recorded(cls, about: Mapping[str, str]) -> Given:
        """The pictures that a result was made from, found again at their places.

        raises  RequestError when one is gone, was never a file, or is another one now
        """
        found: dict[str, Path] = {}
        for name, value in about.items():
            if name.split(" ")[0] in KINDS:
                found[name] = _again(name, value)
        images = [path for name, path in found.items() if name.startswith("image")]
        return cls(tuple(images), found.get("mask"), found.get("depth"))


def digest(source: Source) -> str:
    """16 hex digits of the SHA-256 of a file's content, or of a picture's or array's values."""
    if isinstance(source, (str, Path)):
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise StorageError(
                f"cannot read {source}: {error.strerror or error}",
                hint="check the path and that you may read the file",
            ) from None
    elif isinstance(source, bytes):
        content = source
    else:
        content = source.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _place(source: Source) -> str:
    return str(Path(source).resolve()) if isinstance(source, (str, Path)) else ""


def _again(name: str, value: str) -> Path:
    known, _, place = value.partition(" ")
    again = f"give it again with --{name.split(' ')[0]}"
    if not place:
        raise RequestError(f"the {name} of that run was never a file", hint=again)
    path = Path(place)
    if not path.is_file():
        raise RequestError(f"the {name} of that run is gone: there is no {path}", hint=again)
    if digest(path) != known:
        raise RequestError(f"the {name} of that run has changed since: {path}", hint=again)
    return path
