"""What every task is handed, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import latents
from ..bundle import ModelFacts
from ..canvas import Canvas
from ..given import Given
from ..inputs import Placed, PlacedMask
from ..noise import NoiseStream
from ..ports import Array, Floats, Open
from ..request import Request
from ..table import Table

Statistics = tuple[Floats, Floats] | tuple[None, None]


@dataclass(frozen=True)
class Work:
    """One run.

    mask        what is repainted; None where the task has none
    tile        side of a VAE tile in latent cells; None: whole
    cuts        component -> names of its bands, where tiles go by them
    statistics  mean and deviation of image embeddings, float32 [D], where the model has them
    """

    facts: ModelFacts
    request: Request
    given: Given
    open: Open
    table: Table
    canvas: Canvas
    mask: PlacedMask | None = None
    tile: int | None = None
    statistics: Statistics = (None, None)
    cuts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent, [C, h, w]."""
        return self.canvas.latent(self.facts.latent)

    @property
    def placed(self) -> Placed:
        assert self.canvas.placed is not None, "this task has a picture on its canvas"
        return self.canvas.placed

    def encode(self, pixels: Floats) -> Floats:
        """float32 [3, H, W] -> moments [2C, h, w]"""
        cut = self.cuts.get("vae_encoder", ())
        return latents.encode(self.open, pixels, self.facts.latent.factor, self.tile, cut)

    def decode(self, latent: Array) -> Floats:
        """[C, h, w], the scale in it -> picture [3, H, W], about -1..1"""
        cut = self.cuts.get("vae_decoder", ())
        return latents.decode(self.open, latent, self.facts.latent.scale, self.tile, cut)

    def sample(self, moments: Floats, streams: Streams) -> Floats:
        """A latent [C, h, w] from the moments, the scale in it."""
        return latents.sample(moments, streams.other.normal(self.shape), self.facts.latent.scale)

    def start(self, noise: Floats, latent: Floats | None = None) -> Floats:
        """The first x: unit noise, and a picture's latent where the schedule begins from one."""
        x = np.float32(self.table.start_noise) * noise
        if latent is not None:
            x += np.float32(self.table.start_scale) * latent
        return x


@dataclass(frozen=True)
class Beginning:
    """How one picture begins.

    x           float32 [C, h, w]
    channels    joined behind x in every call, float32 [C', h, w]
    label       class_labels of this picture: int64 [], or float32 [D]
    unlabelled  the same for the unconditional half; None where they do not differ
    kept        (latent, unit noise) of the given picture, for what must not be repainted
    """

    x: Floats
    channels: Floats | None = None
    label: Array | None = None
    unlabelled: Array | None = None
    kept: tuple[Floats, Floats] | None = None


@dataclass(frozen=True)
class Streams:
    """One picture's noise: `start` for its first x, `other` for all else. Mostly the same stream;
    the reference draws the start of some tasks from numpy, and the rest from torch."""

    start: NoiseStream
    other: NoiseStream


Begin = Callable[[Streams], Beginning]
