"""Draws captions with the trained parts: a sheet, and how many have their own emoji nearest.

    python evaluate.py --data DIR --vae DIR/vae.pt --unet DIR/unet.pt --out sheet.png [--count 40]

25 DDIM steps, guidance 5. Nearest is by distance of the final latents, over all trained pictures on
the ground asked for. Odd rows of the sheet show the training picture, even rows what was drawn.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from common import GROUNDS, Phrases, Tokens, arguments, compose, load, prepare
from PIL import Image
from torch import Tensor
from train_unet import STEPS, TEXT, UNET, alphas_cumprod, encode
from train_vae import CONFIG as VAE

from sdengine.export.modules.text import TextEncoder
from sdengine.export.modules.unet import UNet
from sdengine.export.modules.vae import VAEDecoder, VAEEncoder

log = logging.getLogger("evaluate")


@torch.no_grad()
def draw(unet: UNet, context: Tensor, x: Tensor, steps: int, guidance: float) -> Tensor:
    """DDIM with eta 0 from noise x [B, 4, h, w]; context [2B, 77, width], the empty one first."""
    abar = alphas_cumprod().to(x.device)
    levels = torch.arange(0, STEPS, STEPS // steps).flip(0) + 1
    for i, t in enumerate(levels):
        now = abar[t]
        after = abar[levels[i + 1]] if i + 1 < len(levels) else abar[0]
        a, s = float(now.sqrt()), float((1 - now).sqrt())
        both = unet(torch.cat([x, x]), t.expand(2 * len(x)).to(x.device), context)
        empty, asked = both.float().chunk(2)
        v = empty + guidance * (asked - empty)
        x0, noise = a * x - s * v, a * v + s * x
        x = float(after.sqrt()) * x0 + float((1 - after).sqrt()) * noise
    return x


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--unet", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    args = parser.parse_args()
    device = prepare(args)

    first, second = load(args.vae), load(args.unet)
    unet, text = UNet(UNET).eval().to(device), TextEncoder(TEXT).eval().to(device)
    encoder, decoder = VAEEncoder(VAE).eval().to(device), VAEDecoder(VAE).eval().to(device)
    unet.load_state_dict(second["unet"])
    text.load_state_dict(second["text"])
    encoder.load_state_dict(first["encoder"])
    decoder.load_state_dict(first["decoder"])
    subjects = second["emoji"]
    phrases = Phrases(args.data / "phrases.json")
    pictures = torch.from_numpy(np.load(args.data / f"pictures-{args.size}.npy")[:subjects])
    latents = encode(encoder, pictures, first["scale_factor"], device)

    rng = np.random.default_rng(args.seed)
    asked = rng.permutation(subjects)[: args.count]
    grounds = list(GROUNDS)
    ground = np.where(np.arange(len(asked)) % 4 == 3, rng.integers(1, len(grounds), len(asked)), 0)
    captions = [
        phrases.names[i][0] + (f" on a {grounds[g]} background" if g else "")
        for i, g in zip(asked, ground, strict=True)
    ]
    ids = Tokens()([""] * len(asked) + captions).to(device)
    noise = torch.randn(len(asked), *latents.shape[2:]).to(device)
    with torch.no_grad():
        x = draw(unet, text(ids), noise, args.steps, args.guidance)
        drawn = torch.cat([decoder(part / first["scale_factor"]) for part in x.split(8)]).cpu()

    hits = 0
    for i, g, z, caption in zip(asked, ground, x.cpu(), captions, strict=True):
        nearest = int(((latents[:, g] - z) ** 2).mean((1, 2, 3)).argmin())
        hits += nearest == i
        if nearest != i:
            log.info("  %s -> %s", caption, phrases.names[nearest][0])
    log.info("step %d: nearest is its own: %d of %d", second["step"], hits, len(asked))

    colours = torch.tensor(list(GROUNDS.values()))[torch.from_numpy(ground)]
    pairs = torch.stack([compose(pictures[torch.from_numpy(asked)], colours), drawn])
    cells = ((pairs.clamp(-1, 1) + 1) * 127.5).round().byte()
    columns = 10
    rows = [
        torch.cat(list(row), 2)
        for part in range(0, len(asked), columns)
        for row in cells[:, part : part + columns]
        if row.shape[0] == columns
    ]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(args.out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
