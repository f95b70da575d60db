"""Variations of a picture, and mixtures of several: their embeddings steer beside the text.

source      Ramesh et al. 2022, arXiv:2204.06125; reference-spec 3.11
"""

from __future__ import annotations

import numpy as np

from ..augment import Augmentor, mix
from ..inputs import Source, open_picture, pixels_of
from ..ports import Floats
from ..prepare import for_image_encoder
from .work import Begin, Beginning, Streams, Work

MIXED_LEVEL = 50  # the reference noises a mixture again


def prepare(work: Work) -> Begin:
    facts, request = work.facts.image_conditioning, work.request
    assert facts is not None
    assert request.noise_level is not None
    augmentor = Augmentor.squaredcos_cap_v2(facts.noise.timesteps, *work.statistics)
    level, images = augmentor.checked(request.noise_level), work.given.images
    weights = (1.0,) * len(images) if request.weights is None else request.weights
    mix([np.zeros(2, np.float32)] * len(images), weights)  # refuses bad weights before the work
    embeddings = [_embedded(work, image) for image in images]

    def begin(streams: Streams) -> Beginning:
        vectors = [
            augmentor.class_vector(e, level, streams.other.normal(e.shape)) for e in embeddings
        ]
        vector = vectors[0]
        if len(vectors) > 1:
            noise = streams.other.normal(embeddings[0].shape)
            vector = augmentor.again(mix(vectors, weights), MIXED_LEVEL, noise)
        x = work.start(streams.start.normal(work.shape))
        return Beginning(x, label=vector, unlabelled=np.zeros_like(vector))

    return begin


def _embedded(work: Work, source: Source) -> Floats:
    """A picture's embedding, [D]."""
    facts = work.facts.image_conditioning
    assert facts is not None
    picture = pixels_of(open_picture(source, background=work.request.background))
    pixels = for_image_encoder(picture, facts.size, facts.mean, facts.std)
    session = work.open("image_encoder", {"B": 1})
    embedding: Floats = session({"pixels": pixels})["embedding"][0]
    return embedding
