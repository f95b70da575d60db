"""A classifier that looks at each finished picture, where the bundle has one.

It is a component like any other, `safety`: `image` float32 [B, 3, S, S] -> `unsafe` float32 [B] in
0..1. Its config holds size, mean and std of its input (of RGB in 0..1) and the threshold. The
runtime only decides what follows: nothing, a word in the metadata, or a picture that shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .ports import Floats, Open

COMPONENT = "safety"
NONE = "no classifier in the bundle"


@dataclass(frozen=True)
class Verdict:
    """word   for the metadata: `off`, `passed 0.02`, `marked 0.91`, `blocked 0.91`, or NONE"""

    image: Image.Image
    word: str
    objected: bool = False


def judge(
    image: Image.Image, mode: str, open_session: Open, config: Mapping[str, Any] | None
) -> Verdict:
    """What becomes of an RGB picture.

    mode        off, mark or block
    config      of the component; None where the bundle has no classifier
    """
    if mode == "off":
        return Verdict(image, "off")
    if config is None:
        return Verdict(image, NONE)
    session = open_session(COMPONENT, {"B": 1})
    unsafe = float(session({"image": _input(image, config)})["unsafe"][0])
    if unsafe < config["threshold"]:
        return Verdict(image, f"passed {unsafe:.2f}")
    if mode == "mark":
        return Verdict(image, f"marked {unsafe:.2f}", objected=True)
    return Verdict(unrecognisable(image), f"blocked {unsafe:.2f}", objected=True)


def unrecognisable(image: Image.Image) -> Image.Image:
    """Four by four patches of colour, smoothed: never black, and nothing can be made out."""
    patches = image.resize((4, 4), Image.Resampling.BOX).resize(image.size)
    return patches.filter(ImageFilter.GaussianBlur(max(image.size) / 16))


def _input(image: Image.Image, config: Mapping[str, Any]) -> Floats:
    side = config["size"]
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    unit = np.asarray(small, np.float32) / np.float32(255)
    scaled = (unit - np.float32(config["mean"])) / np.float32(config["std"])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)
