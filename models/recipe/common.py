"""What the training scripts share: data, captions, token ids, checkpoints, exponential averages."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "red": (214, 48, 49),
    "orange": (245, 150, 50),
    "yellow": (250, 215, 80),
    "green": (70, 165, 90),
    "blue": (60, 120, 220),
    "pink": (245, 165, 200),
}
PLACES = ("on a {} background", "{} background", "on {}")
PLAIN = 0.6  # share of the training pictures that stand on white, most with no word about it
DROPPED = 0.12  # share of captions replaced by the empty one, for guidance


class Phrases:
    """The subjects' names and the captions made of them."""

    def __init__(self, path: Path) -> None:
        self.names: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, subject: int, ground: str, rng: np.random.Generator) -> str:
        """One of the ways to ask for this subject on this ground."""
        if rng.random() < DROPPED:
            return ""
        names = self.names[subject]
        name = names[0] if rng.random() < 0.6 else names[rng.integers(len(names))]
        if rng.random() < 0.25:
            name = bare(name)
        if ground != "white" or rng.random() < 0.2:
            place = rng.choice(PLACES, p=(0.7, 0.15, 0.15))
            name = f"{name} {place.format(ground)}"
        return f"a 3d emoji of {name}" if rng.random() < 0.15 else name


def bare(name: str) -> str:
    """The phrase without its article."""
    first, _, rest = name.partition(" ")
    return rest if first in ("a", "an", "the") else name


def compose(pictures: Tensor, colours: Tensor) -> Tensor:
    """uint8 [B, h, w, 4] over colours [B, 3] (0..255) -> float [B, 3, h, w] in [-1, 1]."""
    picture = pictures.permute(0, 3, 1, 2).float() / 255
    ground = colours.float()[:, :, None, None] / 255
    alpha = picture[:, 3:]
    return (picture[:, :3] * alpha + ground * (1 - alpha)) * 2 - 1


def colour(name: str) -> Tensor:
    """The RGB triple of a named ground, as a row."""
    return torch.tensor([GROUNDS[name]])


class Tokens:
    """Captions -> ids [B, 77] by open_clip's rules, padded with 0."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer = SimpleTokenizer()
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Iterable[str]) -> Tensor:
        return torch.stack([self._row(caption) for caption in captions])

    def _row(self, caption: str) -> Tensor:
        if caption not in self._known:
            self._known[caption] = self._tokenizer([caption])[0].long()
        return self._known[caption]


def used_words(phrases: Phrases, tokens: Tokens) -> Tensor:
    """Ids of every word that a caption can hold, in order."""
    captions = [name for names in phrases.names for name in names]
    captions += [bare(caption) for caption in captions]
    captions += [place.format(ground) for place in PLACES for ground in GROUNDS]
    return torch.unique(tokens([*captions, "a 3d emoji of", ""]))


class Average:
    """Exponential moving average of a module's parameters, with a warm-up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        state = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[k] for k in self.values], 1 - decay)


def rate(step: float, total: float, peak: float, warm: int = 100, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up, then a cosine down to floor * peak."""
    if step < warm:
        return peak * (step + 1) / warm
    part = min(1.0, (step - warm) / max(1.0, total - warm))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))


class Budget:
    """How far the run is, from 0 to 1, by wall time over all its restarts."""

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        self.total_s = minutes * 60
        self._start = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def part(self) -> float:
        return min(1.0, self.spent_s / self.total_s)


def save(path: Path, value: Any) -> None:
    """Writes beside the final place, then renames."""
    beside = path.with_suffix(".part")
    torch.save(value, beside)
    os.replace(beside, path)


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options every script has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder data.py wrote")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the default")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    """Threads, seed and device as asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return torch.device(args.device)
