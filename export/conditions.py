"""What a UNet takes beside latent, time and text in a recorded run: made as a real run makes it.

A drawn picture stands for the user's. Inpainting gets a mask and the masked latent, depth2img a
depth map, the x4 upscaler the noised small picture and its level, unCLIP the class vector of the
picture's embedding.

source      reference-spec of Stable Diffusion 2, sections 1.4, 1.9 to 1.11, 3.8 to 3.11
checked by  tests/parity/test_conditions.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..engine.bundle import STATISTICS, ModelFacts
from ..engine.ports import Array
from .companions import squared_cosine

LEVEL = 20  # the x4 upscaler's usual noise level
Sides = tuple[int, int]


@dataclass(frozen=True)
class Conditions:
    """Further inputs of the UNet.

    channels    latent sides -> float32 [1, C, h, w], behind the latent's channels; None: no more
    labels      `class_labels` for both halves of the guidance, or nothing
    """

    channels: Callable[[Sides], Array] | None = None
    labels: Mapping[str, Array] = field(default_factory=dict)


def picture(height: int, width: int) -> Array:
    """float32 [1, 3, height, width] in -1..1: a sky, a ground, a disc, and some grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    sky = np.stack([0.2 + 0.5 * y, 0.4 + 0.4 * y, 0.9 - 0.3 * y])
    ground = np.stack([0.5 - 0.3 * x, 0.35 + 0.2 * x, 0.15 + 0.1 * y])
    disc = np.stack([0.9 + 0 * x, 0.7 - 0.5 * y, 0.1 + 0 * x])
    result = np.where(y > 0.6, ground, sky)
    result = np.where((y - 0.45) ** 2 + (x - 0.5) ** 2 < 0.05, disc, result)
    grain = np.random.default_rng(1).standard_normal(result.shape, np.float32)
    drawn: Array = np.clip(2 * result + 0.05 * grain - 1, -1, 1)[None].astype(np.float32)
    return drawn


def hole(sides: Sides) -> Array:
    """The mask: float32 [1, 1, h, w], 1 where the picture is painted anew."""
    mask = np.zeros((1, 1, *sides), np.float32)
    h, w = sides
    mask[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4] = 1
    return mask


def inpainting(facts: ModelFacts, sides: Sides, encode: Callable[[Array], Array]) -> Conditions:
    """encode: image -> moments. The mask, then the latent of the picture with a grey hole."""
    factor = facts.latent.factor
    whole = picture(sides[0] * factor, sides[1] * factor)
    kept = whole * (1 - np.kron(hole(sides), np.ones((factor, factor), np.float32)))
    moments = encode(kept.astype(np.float32))
    latent = moments[:, : facts.latent.channels] * np.float32(facts.latent.scale)

    def channels(at: Sides) -> Array:
        return np.concatenate([hole(at), resized(latent, at)], axis=1)

    return Conditions(channels)


def depth(found: Array | None) -> Conditions:
    """found: float32 [1, H, W], larger is nearer; without it, a ground that comes nearer downwards.
    Brought to -1..1, as the UNet takes it."""
    if found is None:
        found = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None, :, None], 64, axis=2)
    whole = found[:, None]

    def channels(at: Sides) -> Array:
        d = resized(whole, at)
        low, high = d.min(), d.max()
        # A network without training may see nothing but flatness.
        span = high - low if high > low else np.float32(1)
        scaled: Array = 2 * (d - low) / span - 1
        return scaled

    return Conditions(channels)


def low_scale(facts: ModelFacts) -> Conditions:
    """The small picture, noised at LEVEL; the level is the class of both halves."""
    assert facts.low_scale is not None, "a model with a class for each level has its schedule"
    s = facts.low_scale.schedule
    betas = np.linspace(s.beta_start**0.5, s.beta_end**0.5, s.timesteps) ** 2
    kept = float(np.cumprod(1 - betas)[LEVEL])

    def channels(at: Sides) -> Array:
        noise = np.random.default_rng(2).standard_normal((1, 3, *at))
        noised = kept**0.5 * picture(*at) + (1 - kept) ** 0.5 * noise
        small: Array = noised.astype(np.float32)
        return small

    return Conditions(channels, {"class_labels": np.full(2, LEVEL, np.int64)})


def pixels(facts: ModelFacts) -> Array:
    """What the image tower takes: float32 [2, 3, size, size], a picture and its mirror image."""
    conditioning = facts.image_conditioning
    assert conditioning is not None, "an image tower comes with its facts"
    one = picture(conditioning.size, conditioning.size)
    both = (np.concatenate([one, one[..., ::-1]]) + 1) / 2
    mean = np.array(conditioning.mean, np.float32)[:, None, None]
    std = np.array(conditioning.std, np.float32)[:, None, None]
    return ((both - mean) / std).astype(np.float32)


def unclip(facts: ModelFacts, embedding: Array, statistics: Mapping[str, Array]) -> Conditions:
    """The class vector of an embedding [1, D]: noised at level 0, then the level; the half without
    guidance has zeros.

    statistics  under the names of STATISTICS, or nothing
    """
    conditioning = facts.image_conditioning
    assert conditioning is not None, "an image tower comes with its facts"
    width = conditioning.embedding
    mean, std = (statistics.get(n, d) for n, d in zip(STATISTICS, (0.0, 1.0), strict=True))
    kept = 1 - squared_cosine(conditioning.noise.timesteps)[0]
    noise = np.random.default_rng(3).standard_normal((1, width))
    noised = kept**0.5 * (embedding - mean) / std + (1 - kept) ** 0.5 * noise
    level = np.repeat([[1.0, 0.0]], width // 2, axis=1)  # cosines, then sines, of level 0
    vector = np.concatenate([noised * std + mean, level], axis=1)
    both = np.concatenate([np.zeros_like(vector), vector])
    return Conditions(labels={"class_labels": both.astype(np.float32)})


def resized(x: Array, sides: Sides) -> Array:
    """float32 [B, C, h, w], bilinear."""
    if x.shape[2:] == sides:
        return x
    result: Tensor = F.interpolate(torch.from_numpy(x), sides, mode="bilinear")
    found: NDArray[np.float32] = result.numpy()
    return found
