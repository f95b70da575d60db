"""What is asked of the pool, and what it gives."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..engine.batch import APART
from ..engine.request import SEED_END, Request

MaskFrom = Literal["lightness", "clear"]
Fill = Literal["none", "around"]


@dataclass(frozen=True)
class Region:
    """Only what the mask covers is made, at the full size, and put back in its place.

    padding     pixels around the mask that are shown to the model
    blur        pixels, of the seam
    """

    padding: int
    blur: int


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures, as they came. They are unpacked in the worker.

    mask_from   `lightness`: white is repainted; `clear`: what is transparent is
    fill        what is masked is first painted over with the colours `around`, or kept (`none`)
    """

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    mask_from: MaskFrom = "lightness"
    depth: bytes | None = None
    fill: Fill = "none"
    region: Region | None = None

    def __bool__(self) -> bool:
        return bool(self.images) or self.mask is not None or self.depth is not None

    @property
    def blobs(self) -> list[bytes]:
        """In the order in which the worker takes them."""
        others = [blob for blob in (self.mask, self.depth) if blob is not None]
        return [*self.images, *others]

    def about(self) -> dict[str, Any]:
        return {
            "images": len(self.images),
            "mask": None if self.mask is None else self.mask_from,
            "depth": self.depth is not None,
            "fill": self.fill,
            "region": None if self.region is None else asdict(self.region),
        }


@dataclass(frozen=True)
class Ask:
    """One client's request.

    face        which API it came by: what one may interrupt the other must not
    deadline_s  None takes the server's
    """

    model: str
    request: Request
    pictures: Pictures = field(default_factory=Pictures)
    face: str = "jobs"
    deadline_s: float | None = None

    def seeded(self) -> Ask:
        """With a seed drawn, so that a run that must be repeated gives the same pictures."""
        if self.request.seed is not None:
            return self
        seed = secrets.randbelow(SEED_END - self.request.count)
        return replace(self, request=replace(self.request, seed=seed))

    def parts(self) -> list[Request]:
        """The network runs that it takes, each of at most `batch_size` pictures."""
        request = self.request
        firsts = range(0, request.count, request.batch_size)
        return [_part(request, first) for first in firsts]

    def shape(self) -> tuple[object, ...] | None:
        """Equal for asks that may run in one batch; None for one that runs alone."""
        if self.pictures or self.request.count != 1:
            return None
        fields = self.request.to_dict()
        return self.model, *(value for name, value in fields.items() if name not in APART)


def _part(request: Request, first: int) -> Request:
    count = min(request.batch_size, request.count - first)
    return replace(request.own(first), count=count, batch_size=count)


@dataclass(frozen=True)
class Made:
    """One picture.

    pixels      RGB, 3 * width * height bytes
    request     what makes this one picture again
    about       model, bundle, backend, precision, ...
    rough       it was interrupted: this is what the network took it for when it was
    """

    width: int
    height: int
    pixels: bytes
    request: Request
    about: Mapping[str, str]
    rough: bool = False
