"""Whole chains of the reference, one for each task: picture in, picture out.

The pipeline runs on OpenVINO in float32, from bundles exported from the same tiny checkpoints; it
is given the reference's own random numbers, in the order in which it asks for them. What stands
between a picture and its result is all in here: masks, depth, embeddings, noise levels, the last
latents, and the pixels.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api
from sdengine.engine import pipeline

pytestmark = [pytest.mark.export, pytest.mark.ov]

# case -> variant, the noises in the order in which a picture draws them
CASES = {
    "img2img": ("base", ("in.posterior_noise", "in.encode_noise")),
    "inpainting": ("inpainting", ("in.x_T", "in.posterior_noise")),
    "depth2img": ("depth", ("in.posterior_noise", "in.encode_noise")),
    "upscale_x4": ("x4-upscaler", ("in.low_res_noise", "in.x_T")),
    "unclip_h": ("unclip-h", ("in.embedding_noise", "in.x_T")),
    "unclip_l": ("unclip-l", ("in.embedding_noise", "in.x_T")),
}


class Given:
    """A stream that hands out arrays in turn, whatever its seed."""

    def __init__(self, arrays):
        self.arrays = list(arrays)

    def normal(self, shape):
        value = self.arrays.pop(0)
        assert value.shape == tuple(shape), f"asked for {shape}, the next noise is {value.shape}"
        return value


@pytest.mark.parametrize("name", CASES)
def test_chain(golden, variant_bundle, monkeypatch, name):
    case, arrays = golden(f"pipeline_{name}")
    variant, noises = CASES[name]
    settings = case["settings"]
    stream = Given(arrays[n][0] for n in noises)
    monkeypatch.setattr(pipeline, "noise_stream", lambda kind, seed: stream)
    asked = {k: settings[k] for k in ("strength", "noise_level") if k in settings}
    if "in.mask_u8" in arrays:
        asked["mask"] = arrays["in.mask_u8"]
    if name.startswith("unclip"):
        asked |= {"width": 128, "height": 64}
    with api.load(variant_bundle(variant), backend="openvino", precision="f32") as pipe:
        if name == "unclip_l":  # the case was made without statistics; the bundle has some
            monkeypatch.setattr(pipe, "_statistics", (None, None))
        result = pipe(
            prompt=settings["prompt"], negative_prompt=settings["negative_prompt"],
            image=arrays["in.image_u8"], steps=settings["steps"], guidance=settings["guidance"],
            sampler="ddim", schedule="reference", compat="reference", noise="torch", seed=0,
            watermark=False, paste=False, **asked,
        )  # fmt: skip
    assert not stream.arrays, "not all of the reference's noise was drawn"
    assert len(result.timings.rows) == settings["steps_run"]
    made = result.pictures[0]
    uncertain = case["float32_noise"]["latent"]["max_abs"]
    np.testing.assert_allclose(
        made.latent, arrays["out.latent"][0], rtol=0, atol=5 * uncertain + 2e-5
    )
    difference = np.asarray(made.image, int) - arrays["out.image_u8"][0].astype(int)
    assert np.abs(difference).max() <= 1
