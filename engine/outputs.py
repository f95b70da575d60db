"""Where the pictures of a run go, and under which names."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from . import images
from .metadata import Metadata
from .request import Request

_LONGEST = 60  # letters of the prompt in a file's name


class Savable(Protocol):
    """What a Picture of the pipeline is, as far as saving goes."""

    @property
    def image(self) -> Image.Image: ...
    @property
    def request(self) -> Request: ...
    def text(self) -> Metadata: ...


@dataclass(frozen=True)
class Output:
    """A folder, where names are made from prompt and seed and nothing is replaced; or one file.

    folder      where new names are made; unused when `file` is given
    file        its name for one picture; several get their seed into it: `out.7.png`
    """

    folder: Path = Path()
    file: Path | None = None

    @classmethod
    def parse(cls, text: str | None) -> Output:
        """None is the current folder. A text with a suffix, and not a folder's, is a file."""
        if text is None:
            return cls()
        path = Path(text)
        if path.is_dir() or text.endswith("/") or not path.suffix:
            return cls(folder=path)
        return cls(file=path)

    def check(self) -> None:
        """Ask before the run whether it can be written. Raises as images.check_output."""
        images.check_output(self.folder / "picture.png" if self.file is None else self.file)

    def preview(self, prompt: str, pixels: images.Pixels) -> Path:
        """A rough picture, over the one before: `out.preview.png`. Raises as images.save."""
        place = self.folder / stem(prompt) if self.file is None else self.file
        return images.save(Image.fromarray(pixels), place.with_suffix(".preview.png"))

    def save(self, picture: Savable, count: int) -> Path:
        """One picture of `count`. Raises as images.save."""
        request = picture.request
        assert request.seed is not None, "a picture's own request names its seed"
        varied = request.variation_seed
        seed = str(request.seed) if varied is None else f"{request.seed}-{varied}"
        text = picture.text()
        if self.file is None:
            name = f"{stem(request.prompt)}.{seed}"
            return images.save_new(picture.image, self.folder, name, ".png", text)
        numbered = self.file.with_name(f"{self.file.stem}.{seed}{self.file.suffix}")
        return images.save(picture.image, self.file if count == 1 else numbered, text)


def stem(prompt: str) -> str:
    """The prompt as a file name of any system: `A red fox, at dawn!` -> `a-red-fox-at-dawn`."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)
    kept = ""
    for word in words:
        longer = f"{kept}-{word}" if kept else word[:_LONGEST]
        if len(longer) > _LONGEST:
            break
        kept = longer
    return kept if kept else "picture"
