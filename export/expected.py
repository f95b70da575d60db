"""Which tensors a model must have, which others may be there, and the comparison.

The list of what must be there is the networks' own: their state dicts, built without memory.

checked by  tests/unit/checkpoint/test_tensors.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..engine.errors import BadConfig, TensorMismatch
from .containers import TensorRef
from .modules import depth, image_encoder, text, unet, vae

Shapes = dict[str, tuple[int, ...]]

WEIGHTS = ("F16", "BF16", "F32")
_SHOWN = 20  # names in a message; the rest is counted

# Buffers of the diffusion process, in the file but computed again by whoever needs them.
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
)
# Beginnings of names that are known, and that no network of ours has a use for.
TOLERATED = (
    "model_ema.",  # read before this list is asked, or not wanted
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "cond_stage_model.model.attn_mask",
    "cond_stage_model.model.text_projection",
    "cond_stage_model.model.logit_scale",
    "optimizer",  # optimizer., optimizer_states.
    "lr_scheduler",
    "callbacks.",
)
# What a variant has beside the three networks that all have: kept by name, used or not.
COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "inpainting": (),
    "depth": ("depth_model.",),
    "x4-upscaler": ("low_scale_model.",),
    "unclip-h": ("embedder.", "noise_augmentor."),
    "unclip-l": ("embedder.", "noise_augmentor."),
}


def networks(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[nn.Module]]:
    """prefix -> the networks under it, without memory. Raises BadConfig."""
    try:
        vae_config = vae.VAEConfig.from_ldm(configs["vae"])
        with torch.device("meta"):
            found: dict[str, list[nn.Module]] = {
                unet.PREFIX: [unet.UNet(unet.UNetConfig.from_ldm(configs["unet"]))],
                vae.PREFIX: [vae.VAEEncoder(vae_config), vae.VAEDecoder(vae_config)],
                text.PREFIX: [text.TextEncoder(text.TextConfig.from_ldm(configs["text"]))],
            }
            if "depth" in configs:
                depth_config = depth.DepthConfig.from_dict(configs["depth"])
                found[depth.PREFIX] = [depth.DepthNetwork(depth_config)]
            if "image_encoder" in configs:
                image_config = image_encoder.ImageConfig.from_dict(configs["image_encoder"])
                found[image_encoder.PREFIX] = [image_encoder.ImageEncoder(image_config)]
            return found
    except (ValueError, ZeroDivisionError) as error:
        raise BadConfig(
            f"no Stable Diffusion 2 network has these sizes: {error}",
            hint="check the config; if there is none, the file is of another model family",
        ) from error


def expected_shapes(configs: Mapping[str, Mapping[str, Any]]) -> Shapes:
    """Every tensor that the networks need, by its LDM name."""
    return {
        prefix + name: tuple(value.shape)
        for prefix, modules in networks(configs).items()
        for module in modules
        for name, value in module.state_dict().items()
    }


def select(
    tensors: Mapping[str, TensorRef], expected: Shapes, variant: str, layers_used: int
) -> dict[str, TensorRef]:
    """The tensors to keep, in the networks' order, companions last.

    raises      TensorMismatch, listing what is missing, unexpected, of another shape or dtype
    """
    companions = COMPANIONS[variant]
    rest = [name for name in tensors if name not in expected]
    kept = [name for name in rest if name.startswith(companions)] if companions else []
    here = {name: tensors[name] for name in expected if name in tensors}
    unused = _unused_blocks(rest, layers_used)
    problems = [
        ("missing", [n for n in expected if n not in tensors]),
        ("unexpected", [n for n in rest if n not in kept and n not in unused and not known(n)]),
        (
            "of another shape",
            [
                f"{n} {list(t.shape)}, expected {list(expected[n])}"
                for n, t in here.items()
                if t.shape != expected[n]
            ],
        ),
        (
            "of another type",
            [f"{n} {t.dtype}" for n, t in here.items() if t.dtype not in WEIGHTS],
        ),
    ]
    if any(names for _, names in problems):
        raise TensorMismatch(
            "the tensors are not those of the model: " + listing(problems),
            hint="the file is incomplete, or of another kind of model; fetch it again, or, for "
            "tensors of another type, save them as float16, bfloat16 or float32",
        )
    return here | {name: tensors[name] for name in kept}


def known(name: str) -> bool:
    """Whether a tensor without a use is one that model files are known to carry."""
    return name in SCHEDULE or name.startswith(TOLERATED)


def _unused_blocks(names: Iterable[str], used: int) -> set[str]:
    """Tensors of the text blocks after the last one that runs."""
    prefix = text.PREFIX + "transformer.resblocks."
    at = len(prefix)
    return {
        name
        for name in names
        if name.startswith(prefix)
        and (number := name[at:].split(".", 1)[0]).isdecimal()
        and int(number) >= used
    }


def listing(problems: Iterable[tuple[str, list[str]]]) -> str:
    """`2 missing: a, b; 31 unexpected: c, d, ... and 29 more`"""
    parts = []
    for what, names in problems:
        if names:
            more = f" ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(parts)
