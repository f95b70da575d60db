"""Classifier-free guidance around the UNet. It knows no solver.

source      Ho & Salimans 2022, arXiv:2207.12598
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import NumericsError
from .ports import Array, Session
from .table import Row

Open = Callable[[str, Mapping[str, int]], Session]


@dataclass(frozen=True)
class Conditions:
    """What the UNet is given beside latent, time and text, for a batch of B pictures.

    channels    float32 [B, C, h, w], joined behind the latent, the same in both halves
    labels      class_labels: int64 [B], or float32 [B, D]
    unlabelled  those of the unconditional half; None where they are the same
    """

    channels: Array | None = None
    labels: Array | None = None
    unlabelled: Array | None = None


class Guidance:
    """`predict` for the loop: u + s (c - u), both halves in one call, [unconditional, conditional].

    open        (component, dims) -> Session
    uncond      float [B, T, W] text of the unconditional half; None where no row is guided
    cond        float [B, T, W]
    A row with guidance 1 runs the conditional half alone: half the cost.
    """

    def __init__(
        self,
        open_session: Open,
        uncond: Array | None,
        cond: Array,
        conditions: Conditions = Conditions(),
    ) -> None:
        self._open, self._uncond, self._cond = open_session, uncond, cond
        self._conditions = conditions
        self._bound: dict[bool, Session] = {}

    def __call__(self, x: Array, row: Row) -> Array:
        both = row.guidance != 1.0
        session = self._session(both, x)
        beside = self._conditions.channels
        half = x if beside is None else np.concatenate([x, beside], axis=1)
        sample = np.concatenate([half, half]) if both else half
        time = np.full(len(sample), row.t, np.float32)
        out = session({"sample": sample, "timestep": time})["out_sample"]
        if both:
            uncond, out = out[: len(x)], out[len(x) :]
            out -= uncond
            out *= row.guidance
            out += uncond
        flat = out.ravel()
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(flat @ flat)  # one pass, a few microseconds; NaN and infinity survive it
        if not math.isfinite(norm):
            raise NumericsError(
                f"the UNet answered NaN or infinity at step {row.index} (timestep {row.t:g},"
                f" guidance {row.guidance:g})",
                hint="the precision is too low for this model: run again with --precision f32",
            )
        return out

    def _session(self, both: bool, x: Array) -> Session:
        """The UNet with the text held fixed, opened when the first row needs it."""
        if both not in self._bound:
            if both:
                assert self._uncond is not None, "a guided row needs the unconditional text"
                text = np.concatenate([self._uncond, self._cond])
            else:
                text = self._cond
            held = {"encoder_hidden_states": text, **self._labels(both)}
            dims = {"B": len(text), "h": x.shape[2], "w": x.shape[3]}
            session = self._open("unet", dims)
            self._bound[both] = session.bind(held)
        return self._bound[both]

    def _labels(self, both: bool) -> dict[str, Array]:
        labels, without = self._conditions.labels, self._conditions.unlabelled
        if labels is None:
            return {}
        if not both:
            return {"class_labels": labels}
        return {"class_labels": np.concatenate([labels if without is None else without, labels])}
