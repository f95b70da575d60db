"""Writes one Stable Diffusion 2 file of the trained parts, and the config that belongs to it.

    python assemble.py --vae DIR/vae.pt --unet DIR/unet.pt --out DIR/emoji.safetensors

Original key names, float16. The idle last text block, `text_projection` and `logit_scale` are in
the file because every published file has them. Rows of words that no caption uses are zero.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
import yaml
from common import load
from safetensors.torch import save_file
from torch import Tensor
from train_unet import BETAS, STEPS, TEXT, UNET, alphas_cumprod
from train_vae import CONFIG as VAE

from sdengine.export.modules import text, unet, vae

log = logging.getLogger("assemble")


def schedule_buffers() -> dict[str, Tensor]:
    """The twelve tables of the reference's checkpoints; float32 [1000] each."""
    acp = alphas_cumprod()
    before = torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64) ** 2
    variance = betas * (1 - before) / (1 - acp)
    tables = {
        "betas": betas,
        "alphas_cumprod": acp,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": acp.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - acp).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - acp).log(),
        "sqrt_recip_alphas_cumprod": acp.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / acp - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - acp),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - acp),
    }
    return {name: table.float() for name, table in tables.items()}


def text_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower with its idle parts."""
    out = dict(state)
    last, idle = f"resblocks.{TEXT.layers - 1}.", f"resblocks.{TEXT.layers}."
    out |= {k.replace(last, idle): torch.zeros_like(v) for k, v in state.items() if last in k}
    out["text_projection"] = torch.zeros(TEXT.width, TEXT.width)
    out["logit_scale"] = torch.tensor(0.0)
    return out


def config(scale_factor: float, size: int) -> dict[str, object]:
    """In the layout of v2-inference.yaml."""
    return {
        "licence": "MIT",
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "parameterization": "v",
                "linear_start": BETAS[0],
                "linear_end": BETAS[1],
                "timesteps": STEPS,
                "image_size": size // 8,
                "channels": 4,
                "conditioning_key": "crossattn",
                "scale_factor": round(scale_factor, 5),
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": size // 8,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": UNET.model_channels,
                        "attention_resolutions": list(reversed(UNET.attention_ds)),
                        "num_res_blocks": UNET.num_res_blocks,
                        "channel_mult": list(UNET.channel_mult),
                        "num_head_channels": UNET.head_channels,
                        "use_spatial_transformer": True,
                        "use_linear_in_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": UNET.context_dim,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": VAE.embed_dim,
                        "ddconfig": {
                            "double_z": True,
                            "z_channels": VAE.z_channels,
                            "resolution": size,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": VAE.ch,
                            "ch_mult": list(VAE.ch_mult),
                            "num_res_blocks": VAE.num_res_blocks,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                    "params": {
                        "layer": "penultimate",
                        "width": TEXT.width,
                        "layers_stored": TEXT.layers + 1,
                        "layers_used": TEXT.layers,
                        "heads": TEXT.heads,
                    },
                },
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in ("--vae", "--unet", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    first, second = load(args.vae), load(args.unet)
    parts = {
        unet.PREFIX: second["unet"],
        vae.PREFIX: first["encoder"] | first["decoder"],
        text.PREFIX: text_tensors(second["text"]),
    }
    named = {prefix + k: v for prefix, state in parts.items() for k, v in state.items()}
    tensors = {k: v.half().contiguous() for k, v in named.items()} | schedule_buffers()
    bad = [k for k, v in tensors.items() if not v.isfinite().all()]
    if bad:
        raise ValueError(f"not finite: {bad}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside = args.out.with_suffix(".part")
    save_file(tensors, beside, metadata={"format": "pt"})
    sidecar = yaml.safe_dump(config(first["scale_factor"], args.size), sort_keys=False)
    args.out.with_suffix(".yaml").write_text(sidecar, encoding="utf-8")
    beside.chmod(0o644)
    os.replace(beside, args.out)
    count = sum(v.numel() for v in tensors.values())
    log.info("%s: %.2f M, %.1f MB", args.out, count / 1e6, args.out.stat().st_size / 1e6)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
