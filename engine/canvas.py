"""What the network paints on: a size that it takes, and the part of it that the user gets."""

from __future__ import annotations

from dataclasses import dataclass

from . import images
from .bundle import LatentFacts
from .images import Pixels
from .inputs import Placed


@dataclass(frozen=True)
class Canvas:
    """height, width   pixels that the decoder gives
    size            (height, width) of the picture in it
    corner          (top, left) of that picture
    placed          the given picture on the network's side of it, where there is one
    """

    height: int
    width: int
    size: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    placed: Placed | None = None

    def latent(self, facts: LatentFacts) -> tuple[int, int, int]:
        """[C, h, w]"""
        return facts.channels, self.height // facts.factor, self.width // facts.factor

    def crop(self, pixels: Pixels) -> Pixels:
        """uint8 [height, width, 3] -> [*size, 3]"""
        (top, left), (height, width) = self.corner, self.size
        return pixels[top : top + height, left : left + width]

    @property
    def padded(self) -> bool:
        return self.size != (self.height, self.width)


def blank(height: int, width: int, facts: LatentFacts) -> Canvas:
    """For a picture out of noise, at the canvas's centre: a model composes for the whole of it, so
    what is cut off is half as deep on each side."""
    tall, wide = images.padded_size(height, width, facts.factor * facts.multiple)
    return Canvas(tall, wide, (height, width), ((tall - height) // 2, (wide - width) // 2))


def around(placed: Placed, scale: int = 1) -> Canvas:
    """For a given picture, which lies at the top left; `scale` pixels out for one in."""
    _, height, width = placed.pixels.shape
    size = (placed.size[0] * scale, placed.size[1] * scale)
    return Canvas(height * scale, width * scale, size, placed=placed)
