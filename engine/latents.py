"""Between latents and pictures, through the VAE, whole or in tiles.

checked by  tests/unit/test_tiles.py, tests/contract/test_tiling.py (golden cases vae_f8, vae_f4)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import bands
from .ports import Array, Floats, Open
from .tiles import Grid, Mosaic

CLIP = (-30.0, 20.0)  # of the log-variance: reference-spec 1.9, beyond it exp() means nothing


def decode(
    open_session: Open,
    latent: Array,
    scale: float,
    tile: int | None = None,
    cut: Sequence[str] = (),
) -> Floats:
    """One latent, float32 [C, h, w] with the scale in it -> picture [3, H, W], about -1..1.

    tile        side of a tile in latent cells; None decodes the whole at once
    cut         names of the decoder's bands, with which tiles give what the whole gives; without
                them each tile is a picture of its own, and they are blended
    """
    if cut and tile is not None and tile < max(latent.shape[1:]):
        ready = latent / latent.dtype.type(scale)
        return bands.run(open_session, "vae_decoder", cut, ready, tile, latent.shape[1])
    grid = Grid.over(latent.shape[1], latent.shape[2], tile)
    dims = {"B": 1, "h": grid.rows.side, "w": grid.columns.side}
    session = open_session("vae_decoder", dims).graph("full")
    mosaic = None
    for window in grid.windows():
        part = latent[(slice(None), *window)][None] / latent.dtype.type(scale)
        picture: Floats = session({"latent": part})["image"][0]
        if len(grid) == 1:
            return picture
        factor = picture.shape[1] // grid.rows.side
        if mosaic is None:
            height, width = (n * factor for n in latent.shape[1:])
            mosaic = Mosaic(grid, (len(picture), height, width), picture.dtype, factor)
        mosaic.add(picture, _times(window, factor))
    assert mosaic is not None, "a grid has at least one tile"
    return mosaic.result


def encode(
    open_session: Open,
    pixels: Array,
    factor: int,
    tile: int | None = None,
    cut: Sequence[str] = (),
) -> Floats:
    """One picture, float32 [3, H, W] in -1..1 -> moments [2C, h, w]: mean, then log-variance.

    factor      pixels a latent cell, on each side; H and W are multiples of it
    tile        side of a tile in latent cells; None encodes the whole at once
    cut         names of the encoder's bands, as for `decode`
    """
    height, width = (n // factor for n in pixels.shape[1:])
    if cut and tile is not None and tile < max(height, width):
        return bands.run(open_session, "vae_encoder", cut, pixels, tile, height)
    grid = Grid.over(height, width, tile)
    dims = {"B": 1, "H": grid.rows.side * factor, "W": grid.columns.side * factor}
    session = open_session("vae_encoder", dims).graph("full")
    mosaic = None
    for window in grid.windows():
        part = pixels[(slice(None), *_times(window, factor))][None]
        moments: Floats = session({"image": part})["moments"][0]
        if len(grid) == 1:
            return moments
        if mosaic is None:
            mosaic = Mosaic(grid, (len(moments), height, width), moments.dtype)
        mosaic.add(moments, window)
    assert mosaic is not None, "a grid has at least one tile"
    return mosaic.result


def sample(moments: Array, noise: Array | None, scale: float) -> Floats:
    """A latent [C, h, w] with the scale in it: scale * (mean + deviation * noise).

    moments     float32 [2C, h, w] of `encode`
    noise       unit noise [C, h, w]; None takes the mode, which is the mean
    """
    mean, log_variance = np.split(moments, 2)
    if noise is not None:
        mean = mean + np.exp(0.5 * np.clip(log_variance, *CLIP)) * noise
    latent: Floats = (mean * moments.dtype.type(scale)).astype(moments.dtype)
    return latent


def _times(window: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    rows, columns = window
    return (
        slice(rows.start * factor, rows.stop * factor),
        slice(columns.start * factor, columns.stop * factor),
    )
