"""Fits the linear map from latent cells to colours that previews use: the bundle's fact `preview`.

    python fit_preview.py [--model emoji] [--fit 20] [--test 10] [--steps 10] [--out preview.json]

Least squares over the cells of drawn pictures, each against the mean colour of the pixels it
decodes to. Writes the fact as JSON; says R^2 of the fitted and of the held-out pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sdengine

log = logging.getLogger("fit_preview")

HERE = Path(__file__).parent
GROUNDS = ("", " on a red background", " on a blue background", " on a black background",
           " on a green background")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--captions", type=Path, default=HERE / "captions.txt")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--fit", type=int, default=20, help="prompts to fit on")
    parser.add_argument("--test", type=int, default=10, help="further prompts to test on")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("preview.json"))
    args = parser.parse_args()

    captions = args.captions.read_text(encoding="utf-8").splitlines()[: args.fit + args.test]
    prompts = [caption + GROUNDS[i % len(GROUNDS)] for i, caption in enumerate(captions)]
    cells, colours = draw(args.model, prompts, args.steps)
    known = args.fit * len(cells) // len(prompts)
    solution, *_ = np.linalg.lstsq(cells[:known], colours[:known])
    for name, part in (("fitted", slice(known)), ("held out", slice(known, None))):
        quality = explained(cells[part] @ solution, colours[part])
        log.info("R^2, %s: %.4f", name, quality)
    rounded = np.round(solution, 5).tolist()
    args.out.write_text(json.dumps({"matrix": rounded[:-1], "bias": rounded[-1]}) + "\n")


def draw(model: str, prompts: list[str], steps: int) -> tuple[NDArray[np.float64], ...]:
    """Latent cells [n, C + 1], the last column ones; and colours in -1..1, [n, 3]."""
    cells, colours = [], []
    with sdengine.load(model, precision="f32") as pipe:
        factor = pipe.facts.latent.factor
        for seed, prompt in enumerate(prompts):
            made = pipe(prompt=prompt, steps=steps, guidance=5.0, seed=seed).pictures[0]
            channels, h, w = made.latent.shape
            cell = made.latent.reshape(channels, -1).T.astype(np.float64)
            cells.append(np.concatenate([cell, np.ones((h * w, 1))], axis=1))
            pixels = np.asarray(made.image, np.float64) / 127.5 - 1
            blocks = pixels.reshape(h, factor, w, factor, 3)
            colours.append(blocks.mean(axis=(1, 3)).reshape(-1, 3))
    return np.concatenate(cells), np.concatenate(colours)


def explained(guess: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """R^2 over all cells and colours."""
    return float(1 - ((guess - truth) ** 2).sum() / ((truth - truth.mean(axis=0)) ** 2).sum())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
