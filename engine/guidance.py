"""Classifier-free guidance around the UNet. It knows no solver.

source      Ho & Salimans 2022, arXiv:2207.12598
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .errors import NumericsError
from .ports import Array, Session
from .table import Row

Open = Callable[[str, Mapping[str, int]], Session]


class Guidance:
    """`predict` for the loop: u + s (c - u), both halves in one call, [unconditional, conditional].

    open        (component, dims) -> Session
    uncond      float [B, T, W] text of the unconditional half; None where no row is guided
    cond        float [B, T, W]
    A row with guidance 1 runs the conditional half alone: half the cost.
    """

    def __init__(self, open_session: Open, uncond: Array | None, cond: Array) -> None:
        self._open, self._uncond, self._cond = open_session, uncond, cond
        self._bound: dict[bool, Session] = {}

    def __call__(self, x: Array, row: Row) -> Array:
        both = row.guidance != 1.0
        session = self._session(both, x)
        sample = np.concatenate([x, x]) if both else x
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
            dims = {"B": len(text), "h": x.shape[2], "w": x.shape[3]}
            session = self._open("unet", dims)
            self._bound[both] = session.bind({"encoder_hidden_states": text})
        return self._bound[both]
