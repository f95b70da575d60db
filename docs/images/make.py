"""Draws the pictures of README and docs that show tasks, with the packaged model.

    python docs/images/make.py [--out docs/images]

Writes fox.png and face.png, which the tasks start from, and mask.png; strength-panda.png and
strength-blue.png (the fox, then what becomes of it, by strength) and inpainting.png (the face, its
mask, and two prompts for the upper half). Float32; on the same engine the same pixels again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import sdengine
from sdengine.engine.grid import sheet

STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
HOLE = (0, 0, 127, 71)  # left, top, right, bottom; all within
FACE = "a grinning face"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle(HOLE, fill=255)
    mask.save(out / "mask.png", optimize=True)
    with sdengine.load(precision="f32") as pipe:
        fox = pipe(prompt="a fox", guidance=5.0, seed=1).pictures[0].save(out / "fox.png")
        face = pipe(prompt=FACE, guidance=5.0, seed=1).pictures[0].save(out / "face.png")

        def turned(strength: float, prompt: str, guidance: float) -> Image.Image:
            return pipe(
                image=fox, prompt=prompt, guidance=guidance, strength=strength, steps=40, seed=3
            ).image

        asked = {"panda": ("a panda", 1.0), "blue": ("a fox on a blue background", 3.0)}
        series = {
            name: [Image.open(fox), *(turned(s, *how) for s in STRENGTHS)]
            for name, how in asked.items()
        }
        repainted = [
            pipe(
                image=face, mask=out / "mask.png", prompt=prompt, guidance=2.0, steps=40, seed=3,
                mask_blur=2.0,
            ).image
            for prompt in ("a smiling face with heart eyes", "a smiling face with sunglasses")
        ]  # fmt: skip
        before = [Image.open(face), mask.convert("RGB")]
    for name, pictures in series.items():
        sheet(pictures, len(pictures)).save(out / f"strength-{name}.png", optimize=True)
    sheet([*before, *repainted], 4).save(out / "inpainting.png", optimize=True)


if __name__ == "__main__":
    main()
