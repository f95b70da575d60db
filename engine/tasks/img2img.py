"""Image to image: the picture's latent, noised to the level where the shortened schedule begins.

source      Meng et al. 2021, arXiv:2108.01073 (SDEdit); reference-spec 3.7
"""

from __future__ import annotations

from .work import Begin, Beginning, Streams, Work


def prepare(work: Work) -> Begin:
    moments = work.encode(work.placed.pixels)

    def begin(streams: Streams) -> Beginning:
        latent = work.sample(moments, streams)
        return Beginning(work.start(streams.start.normal(work.shape), latent))

    return begin
