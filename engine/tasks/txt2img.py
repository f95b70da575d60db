"""Text to image: pure noise in, the UNet's own channels, nothing beside the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle import ModelFacts
from ..errors import RequestError
from ..noise import NoiseStream
from ..ports import Array
from ..table import Table


def check(facts: ModelFacts) -> None:
    """Raises RequestError when the model wants more than noise and text."""
    if facts.variant != "base":
        raise RequestError(
            f"{facts.name} is a model of variant {facts.variant!r}, which needs more than a prompt",
            hint="text to picture runs bundles of variant 'base' (eps or v); `sdengine inspect`"
            " shows a bundle's variant",
        )


def start(table: Table, streams: Sequence[NoiseStream], shape: tuple[int, int, int]) -> Array:
    """The first x, float32 [B, C, h, w]: each picture's own noise at the table's first level."""
    noise = np.stack([stream.normal(shape) for stream in streams])
    return np.multiply(noise, np.float32(table.start_noise))
