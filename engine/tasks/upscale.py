"""Four times the size: the picture itself, slightly noised, as further channels.

source      reference-spec 3.10, 1.11
"""

from __future__ import annotations

import numpy as np

from ..augment import Augmentor
from .work import Begin, Beginning, Streams, Work


def prepare(work: Work) -> Begin:
    facts, level = work.facts.low_scale, work.request.noise_level
    assert facts is not None
    assert level is not None
    noise = facts.schedule
    augmentor = Augmentor.scaled_linear(
        noise.beta_start, noise.beta_end, noise.timesteps, facts.max_level
    )
    low, label = work.placed.pixels, np.array(augmentor.checked(level), np.int64)

    def begin(streams: Streams) -> Beginning:
        noised = augmentor.noised(low, level, streams.other.normal(low.shape))
        return Beginning(work.start(streams.start.normal(work.shape)), noised, label)

    return begin
