"""A rough picture of a latent, without the decoder: one linear map for each cell.

checked by  tests/unit/test_preview.py
"""

from __future__ import annotations

import numpy as np

from .bundle import PreviewFacts
from .images import Pixels
from .ports import Array, Step
from .table import Table


def preview(latent: Array, facts: PreviewFacts, enlarge: int = 1) -> Pixels:
    """uint8 [h * enlarge, w * enlarge, 3]; it never fails, whatever the values are.

    latent      float [C, h, w], the scale in it, as the loop has it
    enlarge     pixels a cell on each side
    """
    matrix, bias = np.array(facts.matrix, np.float32), np.array(facts.bias, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        rgb = np.einsum("chw,cr->hwr", latent, matrix) + bias
    finite = np.nan_to_num(rgb, nan=-1.0, posinf=1.0, neginf=-1.0)
    pixels = np.rint((np.clip(finite, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return np.asarray(pixels.repeat(enlarge, axis=0).repeat(enlarge, axis=1))


def predicted(table: Table, step: Step) -> Array:
    """What the network took the picture for in this row, x0 [B, C, h, w], the scale in it.

    At alpha = 0 (a schedule of zero terminal SNR) a row in terms of the noise says nothing about
    x0; zeros, the mean of all pictures, take its place.
    """
    i = step.row.index
    dtype = step.before.dtype.type
    m: Array = dtype(table.px[i]) * step.before + dtype(table.po[i]) * step.out
    if table.quantity == "data":
        return m
    if table.alphas[i] == 0.0:
        return np.zeros_like(step.before)
    return np.asarray((step.before - dtype(table.sigmas[i]) * m) / dtype(table.alphas[i]))
