"""Draws the captions of a text file with the packaged model, on one labelled sheet.

    python contact_sheet.py [--model emoji] [--out contact-sheet.png] [--columns 8]

25 steps, guidance 5, seed 0 for the first caption, 1 for the second, and so on.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

import sdengine

HERE = Path(__file__).parent
LABEL = 26  # pixels under each picture: two lines of small letters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, default=HERE / "captions.txt")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("contact-sheet.png"))
    parser.add_argument("--columns", type=int, default=8)
    args = parser.parse_args()

    captions = args.captions.read_text(encoding="utf-8").splitlines()
    with sdengine.load(args.model) as pipe:
        pictures = [
            pipe(prompt=caption, steps=25, guidance=5.0, seed=seed).image
            for seed, caption in enumerate(captions)
        ]
    width, height = pictures[0].size
    rows = -(-len(pictures) // args.columns)
    sheet = Image.new("RGB", (args.columns * width, rows * (height + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
        row, column = divmod(i, args.columns)
        place = column * width, row * (height + LABEL)
        sheet.paste(picture, place)
        text = textwrap.fill(caption, width // 6)
        pen.text((place[0] + 3, place[1] + height + 1), text, "black", font_size=9)
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
