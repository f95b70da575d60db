"""Text to image against diffusers, end to end: one folder of weights, one prompt, one seed.

Reference: diffusers' StableDiffusionPipeline with DDIMScheduler (leading, offset 1) in float32.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from sdengine import api
from sdengine.engine.bundle import open_bundle
from sdengine.engine.tokenizer import Tokenizer

with warnings.catch_warnings():  # their own deprecations are none of ours
    warnings.simplefilter("ignore")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

pytestmark = [pytest.mark.export, pytest.mark.slow]

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE, SIDE = "a red fox", "blurry", 7, 50, 7.5, 64


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def reference(request):
    """Small random networks, and the scheduler of SD 2's published folders."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=(2, 4, 4, 4),  # the number of heads
        cross_attention_dim=32,
        use_linear_projection=True,
    )
    # At full strength these random models are chaotic: of v our own float32 and float64 runs part
    # by 2e-2, of epsilon two orders of one sum in float32 by 7e-3. At half strength v stays within
    # 6e-5, and two implementations can be compared.
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
        unet.conv_out.bias.mul_(0.5)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="gelu",
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=request.param,
    )
    # diffusers multiplies up the alphas in float32, off by 1e-6, which 50 guided steps of a random
    # network blow up to 5e-3; the published ones are float64, rounded once
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas)).float()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return unet.eval(), vae.eval(), text.eval(), scheduler


@pytest.fixture(scope="module")
def bundle(reference, tmp_path_factory):
    from sdengine.export import export_bundle
    from sdengine.export.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("diffusers") / "model"
    for name, part in zip(("unet", "vae", "text_encoder", "scheduler"), reference, strict=True):
        part.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    out = folder.with_name("bundle")
    return export_bundle(open_checkpoint(folder), out, precisions=("f32",), tiles=False)


def test_final_latents(reference, bundle):
    unet, vae, text, scheduler = reference
    with api.load(bundle, backend="openvino", precision="f32") as pipe:
        ours = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            sampler="ddim",
            steps=STEPS,
            guidance=GUIDANCE,
            seed=SEED,
            width=SIDE,
            height=SIDE,
        ).pictures[0]

    opened = open_bundle(bundle)
    tokenizer = Tokenizer(opened.tokenizer_file, opened.facts.tokenizer)
    ids = torch.tensor([tokenizer.encode(p).ids for p in (PROMPT, NEGATIVE)])
    theirs = StableDiffusionPipeline(
        vae, text, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        cond, uncond = text(ids).last_hidden_state.split(1)
        latents = theirs(
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            height=SIDE,
            width=SIDE,
            output_type="latent",
        ).images
    assert np.abs(latents[0].numpy()).max() > 1  # a run that moved
    np.testing.assert_allclose(ours.latent, latents[0].numpy(), rtol=0, atol=1e-3)
