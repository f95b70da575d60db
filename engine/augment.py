"""Noise put into a condition, and the level of it told to the network.

The upscaler sees its small picture through noise, unCLIP its image embedding; each has a noise
schedule of its own, beside the one that the latent is made with.

source      reference-spec 1.9, 3.10, 3.11
checked by  tests/golden/test_augment.py (the reference's own pictures and vectors)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .ports import Array, Floats
from .schedule import Doubles

PERIOD = 10_000.0  # of the level's sinusoid, as of the network's time


@dataclass(frozen=True)
class Augmentor:
    """One schedule of noise levels, and the statistics of what it is put into.

    keep, blur  float32 [T]: x at a level is keep * x + blur * noise
    top         the highest level that may be asked for; T - 1 is the table's end
    mean, std   float32 [D], or None: the noise is put into (x - mean) / std

    raises      RequestError for statistics that are not two finite vectors, std above 0
    """

    keep: Floats
    blur: Floats
    top: int
    mean: Floats | None = None
    std: Floats | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.top < len(self.keep), f"level {self.top} of {len(self.keep)}"
        if self.mean is not None or self.std is not None:
            _check_statistics(self.mean, self.std)

    @classmethod
    def scaled_linear(cls, start: float, end: float, timesteps: int, top: int) -> Augmentor:
        """The upscaler's: betas = linspace(sqrt(start), sqrt(end), T)^2.

        The network has classes for all T levels, but met only those up to `top` in training.
        """
        betas = np.linspace(start**0.5, end**0.5, timesteps, dtype=np.float64) ** 2
        return cls(*_levels(betas), top)

    @classmethod
    def squaredcos_cap_v2(
        cls, timesteps: int, mean: Floats | None = None, std: Floats | None = None
    ) -> Augmentor:
        """unCLIP's: beta_i = 1 - f((i + 1) / T) / f(i / T), at most 0.999.

        f(u) = cos^2((u + 0.008) / 1.008 * pi / 2); source: Nichol & Dhariwal 2021,
        arXiv:2102.09672, eq. 17
        """
        at = np.arange(timesteps + 1, dtype=np.float64) / timesteps
        f = np.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls(*_levels(np.minimum(1.0 - f[1:] / f[:-1], 0.999)), timesteps - 1, mean, std)

    def noised(self, x: Array, level: int, noise: Array) -> Floats:
        """x at a noise level. Level 0 is not free of noise.

        x, noise    float32 of one shape; with statistics the last axis is D
        level       a whole number, 0 .. top
        raises      RequestError for another level; for an embedding of another width
        """
        assert noise.shape == x.shape, f"noise {noise.shape} for {x.shape}"
        at = self.checked(level)
        if self.mean is None or self.std is None:
            return np.asarray(self.keep[at] * x + self.blur[at] * noise, np.float32)
        if x.shape != self.mean.shape:
            raise RequestError(
                f"the embedding statistics have {len(self.mean)} numbers; this model's image"
                f" embedding has {list(x.shape)}",
                hint="give the statistics file that was made for this image tower",
            )
        z = self.keep[at] * ((x - self.mean) / self.std) + self.blur[at] * noise
        return np.asarray(z * self.std + self.mean, np.float32)

    def class_vector(self, embedding: Array, level: int, noise: Array) -> Floats:
        """float32 [2D]: the embedding [D] at a noise level, then the level's sinusoid."""
        near = self.noised(embedding, level, noise)
        return np.concatenate([near, level_embedding(level, len(near))])

    def again(self, vector: Array, level: int, noise: Array) -> Floats:
        """A class vector [2D] put at a level: its embedding noised anew, its level replaced."""
        return self.class_vector(vector[: len(vector) // 2], level, noise)

    def checked(self, level: int) -> int:
        """The level as an int. Raises RequestError for what is not a whole number in range."""
        try:
            at = -1 if isinstance(level, bool) else operator.index(level)
        except TypeError:
            at = -1
        if not 0 <= at <= self.top:
            raise RequestError(
                f"noise level {level!r}: this model takes a whole number from 0 to {self.top}",
                hint=f"give --noise-level 0 to {self.top}; 0 keeps the most of the picture",
            )
        return at


def mix(vectors: Sequence[Array], weights: Sequence[float]) -> Floats:
    """Several class vectors as one: sum of w_i y_i over sum of w_i, float32 [2D].

    vectors     [n, 2D]; both halves are averaged, the levels' sinusoids too
    weights     n finite numbers; negative ones push away
    raises      RequestError when the weights sum to 0, are not finite, or are not n
    """
    if len(weights) != len(vectors) or not len(vectors):
        raise RequestError(
            f"{len(vectors)} pictures and {len(weights)} weights",
            hint="give one --weight for each --image, in the same order",
        )
    if not all(map(math.isfinite, weights)):
        raise RequestError(
            f"the weights {_listed(weights)} are not all finite numbers",
            hint="give each --weight as a number such as 0.6",
        )
    total = math.fsum(weights)
    if abs(total) <= 1e-6 * max(map(abs, weights)):
        raise RequestError(
            f"the weights {_listed(weights)} sum to 0, which leaves no average",
            hint="change one --weight; only their proportions matter",
        )
    shares = np.array(weights, np.float64) / total
    return (shares @ np.asarray(vectors, np.float64)).astype(np.float32)


def level_embedding(level: float, dim: int) -> Floats:
    """float32 [dim]: cos(level f_i), then sin(level f_i), f_i = 10000^(-2i / dim); dim is even.

    The angles are float32, as the reference's are: those in double precision lie 5e-5 away from it
    at level 999, these 3e-5, which is the last bit of its exponential.
    """
    assert dim > 0, f"a sinusoid of width {dim}"
    assert dim % 2 == 0, f"a sinusoid of width {dim}"
    half = dim // 2
    exponent = np.float32(-math.log(PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angle = np.float32(level) * np.exp(exponent.astype(np.float64)).astype(np.float32)
    return np.concatenate([np.cos(angle), np.sin(angle)])


def _levels(betas: Doubles) -> tuple[Floats, Floats]:
    """What a level keeps and what it blurs: float64 until the root is taken."""
    kept = np.cumprod(1.0 - betas)
    return np.sqrt(kept).astype(np.float32), np.sqrt(1.0 - kept).astype(np.float32)


def _check_statistics(mean: NDArray[np.float32] | None, std: NDArray[np.float32] | None) -> None:
    shapes = [None if v is None else v.shape for v in (mean, std)]
    alike = shapes[0] is not None and len(shapes[0]) == 1 and shapes[0] == shapes[1]
    values = np.array([mean, std], np.float64) if alike else np.zeros(1)
    if not alike or not np.isfinite(values).all() or not (values[1] > 0).all():
        raise RequestError(
            f"the embedding statistics are not a mean and a deviation: found shapes {shapes[0]}"
            f" and {shapes[1]}; expected two vectors of one length, finite, the deviation above 0",
            hint="give the statistics file that was published with the model",
        )


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{w:g}" for w in weights)
