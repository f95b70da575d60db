"""Trains the UNet and the text tower together on the latents of a trained autoencoder.

    python train_unet.py --data DIR --vae DIR/vae.pt --out DIR/unet.pt --minutes 60 [--emoji 128]

v-prediction on the SD 2 schedule. The weights are those of Min-SNR (Hang et al. 2023,
arXiv:2303.09556) with SNR + 1 in place of SNR: at high noise the text alone says what to draw, and
that must be learnt too. Stops after that many minutes in all; a second call goes on. Writes
{"unet", "text"}, both averages, and the raw state beside them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    GROUNDS,
    PLAIN,
    Average,
    Budget,
    Phrases,
    Tokens,
    arguments,
    compose,
    load,
    prepare,
    rate,
    save,
    used_words,
)
from cpu_norm import install
from muon import optimizers
from torch import Tensor, nn
from train_vae import CONFIG as VAE

from sdengine.export.modules.text import TextConfig, TextEncoder
from sdengine.export.modules.unet import ResBlock, SpatialTransformer, UNet, UNetConfig
from sdengine.export.modules.vae import VAEEncoder

TEXT = TextConfig(width=96, layers=3, heads=3)
UNET = UNetConfig(
    model_channels=32,
    channel_mult=(2, 2, 3, 3),
    num_res_blocks=2,
    attention_ds=(1, 2, 4),
    head_channels=32,
    context_dim=TEXT.width,
)
BETAS = (0.00085, 0.012)
STEPS = 1000
GAMMA = 5.0  # cap of the weight of a squared error of the picture
log = logging.getLogger("unet")


def alphas_cumprod() -> Tensor:
    """float64 [STEPS]"""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@torch.no_grad()
def encode(encoder: VAEEncoder, pictures: Tensor, scale: float, device: torch.device) -> Tensor:
    """Scaled means of every picture on every ground: [N, grounds, 4, h, w]."""
    rows = []
    for picture in pictures:
        colours = torch.tensor(list(GROUNDS.values()))
        image = compose(picture.expand(len(colours), *picture.shape), colours).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(encoder(image).float().chunk(2, 1)[0] * scale)
    return torch.stack(rows).cpu()


@torch.no_grad()
def start(unet: UNet) -> None:
    """Every branch and the output start at zero."""
    for part in unet.modules():
        if isinstance(part, ResBlock):
            part.out_layers[-1].weight.zero_()
        elif isinstance(part, SpatialTransformer):
            part.proj_out.weight.zero_()
            part.proj_out.bias.zero_()
    unet.out[-1].weight.zero_()


def whole(text: dict[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """The tower with all rows of the vocabulary; words that no caption uses are zero."""
    rows = torch.zeros(TEXT.vocab_size, TEXT.width)
    rows[words] = text["token_embedding.weight"].cpu()
    return text | {"token_embedding.weight": rows}


def rest(unet: UNet) -> None:
    """Leaves three of the five transformers of the first level at zero, and skips them."""
    for stage in (unet.input_blocks[1], unet.output_blocks[-2], unet.output_blocks[-3]):
        stage[1].forward = _same


def _same(x: Tensor, context: Tensor) -> Tensor:
    return x


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--emoji", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.999, help="of the average")
    parser.add_argument("--light", action="store_true", help="see rest()")
    args = parser.parse_args()
    device = prepare(args)

    phrases, tokens = Phrases(args.data / "phrases.json"), Tokens()
    count = args.emoji or len(phrases)
    pictures = torch.from_numpy(np.load(args.data / f"pictures-{args.size}.npy")[:count])
    vae = load(args.vae)
    encoder = VAEEncoder(VAE).to(device).eval()
    encoder.load_state_dict(vae["encoder"])
    latents = encode(encoder, pictures, vae["scale_factor"], device)
    log.info("latents %s, std %.3f", tuple(latents.shape), float(latents.std()))

    # Only the words that captions use are trained; `whole` puts their rows back in place.
    words = used_words(phrases, tokens)
    row = torch.zeros(TEXT.vocab_size, dtype=torch.long)
    row[words] = torch.arange(len(words))
    nets = nn.ModuleDict({"unet": UNet(UNET)})
    nets["text"] = TextEncoder(replace(TEXT, vocab_size=len(words)))
    start(nets["unet"])
    if args.light:
        rest(nets["unet"])
    nn.init.normal_(nets["text"].token_embedding.weight, std=0.3)
    nn.init.normal_(nets["text"].positional_embedding, std=0.1)
    size = sum(p.numel() for p in nets["unet"].parameters()) / 1e6
    log.info("unet %.2f M, %d words", size, len(words))
    raw = args.out.with_suffix(".raw")
    spent, step, samples = 0.0, 0, 0
    kept: dict[str, Any] = load(raw) if raw.exists() else {}
    if kept:
        nets.load_state_dict(kept["nets"])
        spent, step, samples = kept["spent_s"], kept["step"], kept["samples"]
    nets.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        install(nets)
    average = Average(nets, args.decay)
    optims = optimizers(nets.values(), args.lr)
    if kept:
        average.values, average.steps = kept["average"], step
        for optim, state in zip(optims, kept["optims"], strict=True):
            optim.load_state_dict(state)

    abar = alphas_cumprod().float().to(device)
    snr = abar / (1 - abar)
    weights = (snr + 1).clamp(max=GAMMA) / (snr + 1)
    weights = weights / weights.mean()
    budget, rng = Budget(args.minutes, spent), np.random.default_rng(args.seed + step)
    grounds = list(GROUNDS)
    saved = logged = first = budget.spent_s
    seen, running = 0, 0.0

    while budget.part < 1:
        subject = rng.integers(count, size=args.batch)
        ground = rng.integers(len(grounds), size=args.batch)
        ground[rng.random(args.batch) < PLAIN] = 0
        x0 = latents[subject, ground].to(device)
        ids = tokens(
            phrases.caption(s, grounds[g], rng) for s, g in zip(subject, ground, strict=True)
        )
        ids = row[ids].to(device)
        place = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch  # stratified
        t = (place * STEPS).long().clamp(max=STEPS - 1).to(device)
        a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(x0)
        noisy = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = rate(step, step / max(budget.part, 1e-6), args.lr)
        with torch.autocast(device.type, torch.bfloat16):
            out = nets["unet"](noisy, t, nets["text"](ids))
        error = ((out.float() - (a * noise - s * x0)) ** 2).mean((1, 2, 3))
        loss = (error * weights[t]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        average.update(nets)
        step += 1
        samples += args.batch
        seen += args.batch
        running += (loss.item() - running) * max(0.01, 1 / step)
        if not math.isfinite(running):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}")
        now = budget.spent_s
        if now - logged > 30:
            speed = seen / (now - first)
            log.info(
                "%6d  %.2f  loss %.4f  %d samples  %.1f/s",
                step,
                budget.part,
                running,
                samples,
                speed,
            )
            logged = now
        if now - saved > 180 or budget.part >= 1:
            smooth = dict(zip(nets.state_dict(), average.values.values(), strict=True))
            facts = {"samples": samples, "spent_s": now, "step": step, "emoji": count}
            both = {
                k: {n.removeprefix(f"{k}."): v for n, v in smooth.items() if n.startswith(f"{k}.")}
                for k in ("unet", "text")
            }
            both["text"] = whole(both["text"], words)
            save(args.out, both | facts)
            state = {"nets": nets.state_dict(), "average": average.values}
            save(raw, state | facts | {"optims": [optim.state_dict() for optim in optims]})
            saved = now


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
