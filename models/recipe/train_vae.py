"""Trains the autoencoder on the pictures of data.py, over many grounds.

    python train_vae.py --data DIR --out DIR/vae.pt --minutes 40 [--decoder-only]

Stops after that many minutes in all; a second call goes on where the first stopped. First on crops
of half the side, in the last part on whole pictures. Writes {"encoder", "decoder", "scale_factor"}.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import GROUNDS, Budget, Phrases, arguments, compose, load, prepare, rate, save
from cpu_norm import install
from muon import optimizers
from torch import Tensor, nn

from sdengine.export.modules.vae import (
    AttnBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    VAEConfig,
    VAEDecoder,
    VAEEncoder,
)

CONFIG = VAEConfig(ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=2)
KL = 2e-3
OFF = 0.25  # of the latents' deviation, at most
log = logging.getLogger("vae")


@torch.no_grad()
def start(net: nn.Module) -> None:
    """Starts as a linear pyramid: branches at zero, steps between levels as copy and average."""
    for part in net.modules():
        if isinstance(part, ResnetBlock):
            part.conv2.weight.zero_()
            part.conv2.bias.zero_()
        elif isinstance(part, AttnBlock):
            part.proj_out.weight.zero_()
        elif isinstance(part, (Upsample, Downsample)):
            taps = slice(1, 2) if isinstance(part, Upsample) else slice(0, 2)
            conv = part.conv
            conv.weight.mul_(0.2)
            eye = torch.eye(conv.in_channels)[:, :, None, None]
            conv.weight[:, :, taps, taps] += eye / (1 if isinstance(part, Upsample) else 4)


def rest(encoder: VAEEncoder, decoder: VAEDecoder) -> None:
    """Leaves the blocks at full resolution, all but the last one, at zero, and skips them.

    They are most of the arithmetic; the network learns 2.5 times as fast per second without.
    """
    idle = [*encoder.encoder.down[0].block, *list(decoder.decoder.up[0].block)[:-1]]
    for block in idle:
        if isinstance(block, ResnetBlock) and block.nin_shortcut is None:
            block.forward = _same  # type: ignore[method-assign]


def _same(x: Tensor) -> Tensor:
    return x


def batch(
    pictures: Tensor, subjects: int, count: int, side: int, rng: np.random.Generator
) -> Tensor:
    """Crops on grounds: half white, the rest a named colour or any colour."""
    named = list(GROUNDS.values())
    size = pictures.shape[1]
    crops, grounds = [], []
    for _ in range(count):
        index = rng.integers(subjects) if rng.random() < 0.85 else rng.integers(len(pictures))
        y, x = rng.integers(size - side + 1, size=2)
        crops.append(pictures[index, y : y + side, x : x + side])
        dice = rng.random()
        any_colour = tuple(int(v) for v in rng.integers(256, size=3))
        white = dice < 0.5
        grounds.append(
            named[0] if white else named[rng.integers(len(named))] if dice < 0.9 else any_colour
        )
    return compose(torch.stack(crops), torch.tensor(grounds))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """L1, plus L1 of the gradients at three scales."""
    total = (a - b).abs().mean()
    d = a - b
    for _ in range(3):
        total = total + 0.5 * (d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean())
        d = F.avg_pool2d(d, 2)
    return total + d.abs().mean()


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures, in dB, of values in [-1, 1]."""
    error = ((a.clamp(-1, 1) - b) ** 2).flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def check(
    encoder: VAEEncoder, decoder: VAEDecoder, pictures: Tensor
) -> tuple[float, float, Tensor]:
    """PSNR of whole pictures on named grounds, 1/std of their latents, and what was decoded."""
    grounds = list(GROUNDS.values())
    colours = torch.tensor([grounds[max(0, i % 16 - 8)] for i in range(len(pictures))])
    device = next(encoder.parameters()).device
    dbs, latents, seen = [], [], []
    for part, colour in zip(pictures.split(16), colours.split(16), strict=True):
        image = compose(part, colour).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean = encoder(image).float().chunk(2, 1)[0]
            out = decoder(mean).float()
        dbs.append(psnr(out, image))
        latents.append(mean)
        seen.append(torch.cat([image, out], 3).cpu())
    return sum(dbs) / len(dbs), 1 / float(torch.cat(latents).std()), torch.cat(seen)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=4, help="whole pictures' worth a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--whole", type=float, default=0.65, help="where the crops end")
    parser.add_argument("--decoder-only", action="store_true", help="the encoder stays as it is")
    parser.add_argument("--light", action="store_true", help="see rest()")
    args = parser.parse_args()
    device = prepare(args)

    pictures = torch.from_numpy(np.load(args.data / f"pictures-{args.size}.npy"))
    subjects = len(Phrases(args.data / "phrases.json"))
    encoder, decoder = VAEEncoder(CONFIG), VAEDecoder(CONFIG)
    start(encoder)
    start(decoder)
    spent, step = 0.0, 0
    if args.out.exists():
        kept: dict[str, Any] = load(args.out)
        encoder.load_state_dict(kept["encoder"])
        decoder.load_state_dict(kept["decoder"])
        spent, step = (0.0, 0) if args.decoder_only else (kept["spent_s"], kept["step"])
    for net in (encoder, decoder):
        net.to(device, memory_format=torch.channels_last)
        if device.type == "cpu":
            install(net)
    if args.light:
        rest(encoder, decoder)
    encoder.requires_grad_(not args.decoder_only)
    trained = [decoder] if args.decoder_only else [encoder, decoder]
    weights = [p for net in trained for p in net.parameters()]
    optims = optimizers(trained, args.lr)
    budget, rng = Budget(args.minutes, spent), np.random.default_rng(args.seed + step)
    saved = logged = budget.spent_s
    images, first = 0, budget.spent_s
    running = 0.0

    while budget.part < 1:
        side = args.size // 2 if budget.part < args.whole else args.size
        count = args.batch * (args.size // side) ** 2
        image = batch(pictures, subjects, count, side, rng)
        image = image.to(device, memory_format=torch.channels_last)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = rate(step, step / max(budget.part, 1e-6), args.lr)
        with torch.autocast(device.type, torch.bfloat16):
            mean, logvar = encoder(image).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            spread = torch.exp(0.5 * logvar)
            if args.decoder_only:  # latents as a UNet draws them: a little off
                off = OFF * torch.rand(len(mean), 1, 1, 1, device=device)
                spread = torch.hypot(spread, off * mean.std())
            out = decoder(mean + spread * torch.randn_like(mean))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = distance(out.float(), image) + KL * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        images += args.batch
        running += (loss.item() - running) * max(0.02, 1 / step)
        if not math.isfinite(running):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}")
        now = budget.spent_s
        if now - logged > 30:
            speed = images / (now - first)
            log.info("%5d  %.2f  loss %.4f  kl %.2f  %.2f/s", step, budget.part, running, kl, speed)
            logged = now
        if now - saved > 240 or budget.part >= 1:
            db, scale, _ = check(encoder, decoder, pictures[: min(subjects, 64)])
            log.info("%5d  %.2f  psnr %.2f dB  scale_factor %.4f", step, budget.part, db, scale)
            value = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
            facts = {"scale_factor": scale, "spent_s": now, "step": step, "psnr": db}
            save(args.out, value | facts)
            saved = now


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
