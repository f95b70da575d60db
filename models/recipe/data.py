"""Fetches the emoji pictures and their names with npm and writes the training data.

    python data.py --out DIR [--size 128] [--emoji 256]

DIR/pictures-<size>.npy   uint8 [M, size, size, 4], RGBA, straight alpha; subjects first
DIR/phrases.json          N lists of phrases, the first of each the usual name

Pictures: Microsoft Fluent Emoji (MIT) as packed in `@lobehub/fluent-emoji-3d`. Names and keywords
beyond `subjects.txt`: `unicode-emoji-json` and `emojilib` (both MIT).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0", "emojilib@4.0.3")
SUBJECTS = Path(__file__).with_name("subjects.txt")
log = logging.getLogger("data")


def fetch(out: Path) -> list[Path]:
    """The packed tarballs, one a package; those already here are kept."""
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for package in PACKAGES:
        stem, version = package.lstrip("@").replace("/", "-").rsplit("@", 1)
        path = out / f"{stem}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=out, check=True)
        found.append(path)
    return found


def read_members(path: Path, suffix: str) -> dict[str, bytes]:
    """File name -> bytes for the members of a tarball that end in `suffix`."""
    with tarfile.open(path) as tar:
        return {
            Path(member.name).name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and member.name.endswith(suffix)
        }


def file_key(emoji: str) -> str:
    """The emoji's code points as the picture files are named, without variation selectors."""
    return "-".join(f"{ord(c):04x}" for c in emoji if ord(c) != 0xFE0F)


def picture(data: bytes, size: int) -> np.ndarray:
    """RGBA uint8 [size, size, 4]; resized with premultiplied alpha so that edges stay clean."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (size, size):
        small = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
        image = small.convert("RGBA")
    return np.asarray(image)


def listed() -> list[tuple[str, list[str]]]:
    """The lines of subjects.txt as (emoji, phrases)."""
    lines = SUBJECTS.read_text(encoding="utf-8").splitlines()
    rows = (line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    return [(emoji, [p.strip() for p in names.split(";")]) for emoji, names in rows]


def unlisted(names: dict[str, Any], words: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Every other emoji that is not a flag, with its published name and its first keywords."""
    known = {file_key(emoji) for emoji, _ in listed()}
    return [
        (emoji, [fact["name"], *words.get(emoji, [])[:3]])
        for emoji, fact in names.items()
        if fact["group"] != "Flags" and file_key(emoji) not in known
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--emoji", default="256", help="how many subjects, or 'all'")
    args = parser.parse_args()

    art, names, words = fetch(args.out / "npm")
    pictures = {
        key.removesuffix(".webp").replace("-fe0f", ""): data
        for key, data in read_members(art, ".webp").items()
    }
    facts = json.loads(read_members(names, "data-by-emoji.json")["data-by-emoji.json"])
    keywords = json.loads(read_members(words, "emoji-en-US.json")["emoji-en-US.json"])
    rows = listed() + unlisted(facts, keywords)
    rows = [row for row in rows if file_key(row[0]) in pictures]
    count = len(rows) if args.emoji == "all" else int(args.emoji)

    # The pictures after the first `count` teach the autoencoder only.
    array = np.stack([picture(pictures[file_key(emoji)], args.size) for emoji, _ in rows])
    np.save(args.out / f"pictures-{args.size}.npy", array)
    phrases = json.dumps([names for _, names in rows[:count]], indent=1)
    (args.out / "phrases.json").write_text(phrases, encoding="utf-8")
    log.info("%d subjects, %d pictures, %d px", count, len(array), args.size)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
