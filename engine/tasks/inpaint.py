"""Repaint what a mask shows white.

A model of 9 input channels is given the mask and the rest of the picture. Any other is run as from
image to image, and after each step what must stay is put back at that step's level of noise.

source      reference-spec 3.8; blending: Lugmayr et al. 2022, arXiv:2201.09865, equation 8
"""

from __future__ import annotations

import numpy as np

from ..inputs import latent_mask
from ..ports import Floats
from .work import Begin, Beginning, Streams, Work


def prepare(work: Work) -> Begin:
    return _by_channels(work) if work.facts.variant == "inpainting" else _by_blending(work)


def mask_of(work: Work) -> Floats:
    """[1, h, w]: 1 where the latent is repainted."""
    assert work.mask is not None
    return latent_mask(work.mask.network, work.facts.latent.factor, thin=work.request.thin_mask)


def _by_channels(work: Work) -> Begin:
    assert work.mask is not None
    pixels, mask = work.placed.pixels, mask_of(work)
    # what is hidden from the network is 0.0, mid-grey
    hidden = work.encode(pixels * (work.mask.network < 0.5).astype(np.float32))
    moments = work.encode(pixels) if work.table.start_scale != 0.0 else None

    def begin(streams: Streams) -> Beginning:
        latent = None if moments is None else work.sample(moments, streams)
        x = work.start(streams.start.normal(work.shape), latent)
        return Beginning(x, np.concatenate([mask, work.sample(hidden, streams)]))

    return begin


def _by_blending(work: Work) -> Begin:
    moments = work.encode(work.placed.pixels)

    def begin(streams: Streams) -> Beginning:
        latent = work.sample(moments, streams)
        noise = streams.start.normal(work.shape)
        x = work.start(noise, None if work.table.start_scale == 0.0 else latent)
        return Beginning(x, kept=(latent, noise))

    return begin
