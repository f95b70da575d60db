"""Text to image: pure noise in, the UNet's own channels, nothing beside the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..noise import NoiseStream
from ..ports import Array
from ..table import Table


def start(table: Table, streams: Sequence[NoiseStream], shape: tuple[int, int, int]) -> Array:
    """The first x, float32 [B, C, h, w]: each picture's own noise at the table's first level."""
    noise = np.stack([stream.normal(shape) for stream in streams])
    return np.multiply(noise, np.float32(table.start_noise))
