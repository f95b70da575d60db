"""Every task against diffusers' pipeline of the same name: one seed, the same small networks.

The networks of both sides are diffusers' own modules, with random weights: what is compared is all
that lies between them, from the picture to the last latent. (That our networks equal theirs is
shown by test_diffusers_txt2img.py and by the golden cases.)

Conditions: DDIM, leading, offset 1, 10 steps, guidance 7.5, float32, 64x64 pixels.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdengine.engine.bundle import open_bundle
from sdengine.engine.pipeline import Pipeline

with warnings.catch_warnings():  # their own deprecations are none of ours
    warnings.simplefilter("ignore")
    import diffusers as hf
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

pytestmark = [pytest.mark.export, pytest.mark.slow]

STEPS, GUIDANCE, SEED, SIDE, WIDTH = 10, 7.5, 11, 64, 32
EMBEDDING = 16


def acp(start, end):
    """As published, in float64 rounded once; diffusers multiplies them up in float32."""
    betas = np.linspace(start**0.5, end**0.5, 1000) ** 2
    return torch.from_numpy(np.cumprod(1 - betas)).float()


def scheduler(prediction, start=0.00085, end=0.012):
    made = hf.DDIMScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    made.alphas_cumprod = acp(start, end)
    made.final_alpha_cumprod = made.alphas_cumprod[0]
    return made


def unet(channels, **more):
    torch.manual_seed(channels)
    made = hf.UNet2DConditionModel(
        sample_size=64,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(32, 64, 64, 64),
        attention_head_dim=(2, 4, 4, 4),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        **more,
    )
    # At full strength a random network is chaotic: a change of 1e-6 in the noise moves the end of a
    # run of ours by 2e-2. At this strength two implementations can be compared.
    with torch.no_grad():
        made.conv_out.weight.mul_(0.03)
    return made.eval()


def vae(levels=4):
    torch.manual_seed(levels)
    made = hf.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32,) * levels,
        latent_channels=4,
        scaling_factor=0.08333 if levels == 3 else 0.18215,
    )
    return made.eval()


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="gelu",
    )  # fmt: skip
    return CLIPTextModel(config).eval()


class Session:
    """A function of torch tensors behind the session protocol."""

    def __init__(self, name, answer, held=()):
        self.name, self.answer, self.held = name, answer, dict(held)

    def bind(self, feeds):
        return Session(self.name, self.answer, self.held | dict(feeds))

    def graph(self, name):
        assert name == "full"
        return self

    def __call__(self, feeds):
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in (self.held | dict(feeds)).items()}
        with torch.inference_mode():
            return {k: v.numpy() for k, v in self.answer(**tensors).items()}


class Networks:
    """diffusers' modules as the sessions of a bundle."""

    def __init__(self, unet, vae, text, **more):
        self.answers = {
            "text_encoder": lambda input_ids: {
                "last_hidden_state": text(input_ids).last_hidden_state
            },
            "unet": lambda sample, timestep, encoder_hidden_states, class_labels=None: {
                "out_sample": unet(
                    sample, timestep, encoder_hidden_states, class_labels=class_labels
                ).sample
            },
            "vae_encoder": lambda image: {"moments": vae.encode(image).latent_dist.parameters},
            "vae_decoder": lambda latent: {"image": vae.decode(latent).sample},
            **more,
        }

    def __call__(self, component, dims, *, paired=False):
        return Session(component, self.answers[component])

    def close(self):
        pass


def sibling(name):
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(tmp_path):
    """Facts alone: no graph of it is read."""
    sibling("tiny_bundle").write(tmp_path / "facts")
    spec = importlib.util.find_spec("open_clip")
    vocabulary = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    opened = open_bundle(tmp_path / "facts")
    tokenizer = replace(opened.facts.tokenizer, start=49406, end=49407, pad=0, length=77)
    latent = replace(opened.facts.latent, channels=4, scale=0.18215, factor=8, multiple=8)
    facts = replace(
        opened.facts, tokenizer=tokenizer, latent=latent, native_size=(SIDE, SIDE), prediction="eps"
    )
    return replace(opened, facts=facts, tokenizer_file=vocabulary)


def ours(bundle, networks, facts, **asked):
    pipe = Pipeline(replace(bundle, facts=replace(bundle.facts, **facts)), networks, {})
    made = pipe(
        prompt="a red fox", negative_prompt="blurry", sampler="ddim", schedule="leading",
        steps=STEPS, guidance=GUIDANCE, seed=SEED, watermark=False, **asked,
    )  # fmt: skip
    return made.pictures[0].latent


def embeds(bundle, text):
    """prompt and negative prompt as diffusers takes them; tokenised by the golden rules."""
    from sdengine.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
    ids = torch.tensor([tokenizer.encode(p).ids for p in ("a red fox", "blurry")])
    with torch.inference_mode():
        cond, uncond = text(ids).last_hidden_state.split(1)
    return {"prompt_embeds": cond, "negative_prompt_embeds": uncond}


def theirs(pipeline, bundle, text, **asked):
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        made = pipeline(
            **embeds(bundle, text), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED), output_type="latent", **asked,
        )  # fmt: skip
    return made.images[0].numpy()


def picture(rng, side=SIDE):
    """Smooth colours: a picture, not noise."""
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def mask_picture():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 8:40] = 255
    return Image.fromarray(mask)


def close(mine, reference):
    assert np.abs(reference).max() > 1  # a run that moved
    np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_img2img(bundle, text, rng, strength):
    net, auto, image = unet(4), vae(), picture(rng)
    mine = ours(bundle, Networks(net, auto, text), {}, image=image, strength=strength)
    reference = hf.StableDiffusionImg2ImgPipeline(
        auto, text, None, net, scheduler("epsilon"), None, None, requires_safety_checker=False
    )
    close(mine, theirs(reference, bundle, text, image=image, strength=strength))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_channels(bundle, text, rng, strength):
    net, auto, image, mask = unet(9), vae(), picture(rng), mask_picture()
    facts = {"variant": "inpainting"}
    asked = {"image": image, "strength": strength}
    mine = ours(bundle, Networks(net, auto, text), facts, mask=mask, **asked)
    reference = hf.StableDiffusionInpaintPipeline(
        auto, text, None, net, scheduler("epsilon"), None, None, requires_safety_checker=False
    )
    close(mine, theirs(reference, bundle, text, mask_image=mask, height=SIDE, width=SIDE, **asked))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_blending(bundle, text, rng, strength):
    net, auto, image, mask = unet(4), vae(), picture(rng), mask_picture()
    asked = {"image": image, "strength": strength}
    mine = ours(bundle, Networks(net, auto, text), {}, mask=mask, **asked)
    reference = hf.StableDiffusionInpaintPipeline(
        auto, text, None, net, scheduler("epsilon"), None, None, requires_safety_checker=False
    )
    close(mine, theirs(reference, bundle, text, mask_image=mask, height=SIDE, width=SIDE, **asked))


def test_depth2img(bundle, text, rng):
    net, auto, image = unet(5), vae(), picture(rng)
    depth = rng.random((SIDE, SIDE)).astype(np.float32)
    asked = {"image": image, "strength": 0.8}
    mine = ours(bundle, Networks(net, auto, text), {"variant": "depth"}, depth=depth, **asked)
    reference = hf.StableDiffusionDepth2ImgPipeline(
        auto, text, None, net, scheduler("epsilon"), None, None
    )
    close(mine, theirs(reference, bundle, text, depth_map=torch.from_numpy(depth)[None], **asked))


def test_upscale(bundle, text, rng):
    from sdengine.engine.bundle import LowScaleFacts

    x4 = replace(bundle.facts.schedule, beta_start=0.0001, beta_end=0.02)
    facts = {
        "variant": "x4-upscaler",
        "prediction": "v",
        "schedule": x4,
        "latent": replace(bundle.facts.latent, scale=0.08333, factor=4),
        "low_scale": LowScaleFacts(x4, 350),
    }
    net = unet(7, num_class_embeds=1000, only_cross_attention=(True, True, True, False))
    auto, image = vae(3), picture(rng, 16)
    mine = ours(bundle, Networks(net, auto, text), facts, image=image, noise_level=20)
    low = hf.DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    low.alphas_cumprod = acp(0.0001, 0.02)
    reference = hf.StableDiffusionUpscalePipeline(
        auto, text, None, net, low, scheduler("v_prediction", 0.0001, 0.02), max_noise_level=350
    )
    close(mine, theirs(reference, bundle, text, image=image, noise_level=20))


@pytest.mark.parametrize("level", [0, 100])
def test_unclip(bundle, text, rng, level):
    from sdengine.engine.bundle import ImageConditioningFacts, NoiseFacts

    facts = {
        "variant": "unclip-h",
        "prediction": "v",
        "image_conditioning": ImageConditioningFacts(
            224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), EMBEDDING,
            NoiseFacts("squaredcos_cap_v2", 1000), False,
        ),
    }  # fmt: skip
    net = unet(
        4, class_embed_type="projection", projection_class_embeddings_input_dim=2 * EMBEDDING
    )
    auto = vae()
    embedding = torch.from_numpy(rng.standard_normal((1, EMBEDDING)).astype(np.float32))
    networks = Networks(net, auto, text, image_encoder=lambda pixels: {"embedding": embedding})
    mine = ours(bundle, networks, facts, image=picture(rng), noise_level=level)
    reference = hf.StableUnCLIPImg2ImgPipeline(
        None, StableUnCLIPImageNormalizer(1), StableUnCLIPImageNormalizer(EMBEDDING),
        hf.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), None, text, net,
        scheduler("v_prediction"), auto,
    )  # fmt: skip
    asked = {"image_embeds": embedding, "noise_level": level, "height": SIDE, "width": SIDE}
    close(mine, theirs(reference, bundle, text, **asked))
