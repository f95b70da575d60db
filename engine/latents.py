"""Between latents and pictures, through the VAE."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .guidance import Open
from .ports import Array, Floats


def decode(open_session: Open, latent: Array, scale: float) -> Floats:
    """One latent, float32 [C, h, w] with the scale in it -> picture [3, H, W], about -1..1."""
    dims: Mapping[str, int] = {"B": 1, "h": latent.shape[1], "w": latent.shape[2]}
    session = open_session("vae_decoder", dims)
    picture: Floats = session({"latent": latent[None] / latent.dtype.type(scale)})["image"][0]
    return picture


def encode(open_session: Open, pixels: Floats) -> Floats:
    """A picture, float32 [3, H, W] in -1..1 -> moments [2C, h, w]: mean, log-variance."""
    session = open_session("vae_encoder", {"B": 1, "H": pixels.shape[1], "W": pixels.shape[2]})
    moments: Floats = session({"image": pixels[None]})["moments"][0]
    return moments


def sample(moments: Floats, noise: Floats | None, scale: float) -> Floats:
    """A latent [C, h, w], the scale in it, from moments; `noise` None gives the mean.

    source      reference-spec 1.6: the log-variance is clamped to -30..20
    """
    mean, log_variance = np.split(moments, 2)
    if noise is not None:
        mean = mean + np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20)) * noise
    return np.float32(scale) * mean
