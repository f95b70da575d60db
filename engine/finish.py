"""From the last latent to the picture that the user gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import images, metadata, safety, watermark
from .images import Pixels
from .inputs import paste
from .ports import Array
from .request import Request
from .tasks import Work


@dataclass(frozen=True)
class Picture:
    """One result.

    image       RGB
    request     what makes this one picture again: its own seed, count 1
    latent      float32 [C, h, w], the scale in it
    about       what goes into the file beside the request: model, bundle, backend, precision, ...
    """

    image: Image.Image
    request: Request
    latent: Array
    about: dict[str, str]

    def save(self, path: Path | str) -> Path:
        """Write a PNG, JPEG or WebP, by the suffix, with everything needed to make it again."""
        return images.save(self.image, Path(path), self.text())

    def text(self) -> metadata.Metadata:
        return metadata.describe(self.request.to_dict(), self.about, self.image.size)


@dataclass(frozen=True)
class Finisher:
    """classifier   config of the bundle's safety component; None where it has none"""

    work: Work
    about: Mapping[str, str]
    classifier: Mapping[str, Any] | None
    warnings: list[str]

    def __call__(self, index: int, latent: Array) -> Picture:
        """Picture number `index` of the run."""
        work, request = self.work, self.work.request
        pixels = self._pasted(work.canvas.crop(images.to_uint8(work.decode(latent))))
        verdict = safety.judge(Image.fromarray(pixels), request.safety, work.open, self.classifier)
        if verdict.objected or verdict.word == safety.NONE:
            self._warn(f"safety: {verdict.word}")
        image, mark = self._marked(verdict.image)
        about = {**self.about, "watermark": mark, "safety": verdict.word}
        return Picture(image, request.own(index), latent, about)

    def _pasted(self, pixels: Pixels) -> Pixels:
        work = self.work
        if work.mask is None or not work.request.paste:
            return pixels
        return paste(np.asarray(work.placed.image), pixels, work.mask.paste)

    def _marked(self, image: Image.Image) -> tuple[Image.Image, str]:
        """The picture with the invisible mark, and a word about it for the metadata."""
        if not self.work.request.watermark:
            return image, "off"
        if not watermark.fits(image.height, image.width):
            self._warn(
                f"no invisible watermark: {image.width}x{image.height} is under 256x256 pixels"
            )
            return image, "picture too small"
        return Image.fromarray(watermark.encode(np.asarray(image))), watermark.TEXT

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
