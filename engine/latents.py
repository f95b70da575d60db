"""Between latents and pictures, through the VAE."""

from __future__ import annotations

from collections.abc import Mapping

from .guidance import Open
from .ports import Array, Floats


def decode(open_session: Open, latent: Array, scale: float) -> Floats:
    """One latent, float32 [C, h, w] with the scale in it -> picture [3, H, W], about -1..1."""
    dims: Mapping[str, int] = {"B": 1, "h": latent.shape[1], "w": latent.shape[2]}
    session = open_session("vae_decoder", dims)
    picture: Floats = session({"latent": latent[None] / latent.dtype.type(scale)})["image"][0]
    return picture
