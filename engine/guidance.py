"""Classifier-free guidance around the UNet, and the features that its shallow rows reuse.

It knows no solver. Which graph runs, and in which halves, stands in the table's row.

source      Ho & Salimans 2022, arXiv:2207.12598; Ma et al. 2023 (DeepCache), arXiv:2312.00858
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np

from .errors import NumericsError
from .ports import Array, Half, Open, Session, State
from .table import Row, Table
from .tiles import WHOLE, Window

Halves = Literal["together", "apart"]
Corner = tuple[int, int]  # of a window of the latent: top, left
OUT = "out_sample"


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


class Cached(NamedTuple):
    """Deep features: of which row, and by half. `both` is [2B, C, h, w], unconditional first."""

    row: int
    halves: Mapping[Half, Mapping[str, Array]]


class Guidance:
    """`predict` for the loop: u + s (c - u), for one batch of pictures.

    open_session  where the UNet comes from
    uncond        float [B, T, W] text of the unconditional half; None where no row is guided
    cond          float [B, T, W]
    halves        "together": one call of 2B, [unconditional, conditional]; "apart": two calls of
                  B, so that rows with and without guidance share one compiled network
    rescale       phi of Lin et al., 0..1; 0 leaves the guided output as it is

    A row with guidance 1 runs the conditional half alone: half the cost. A row of the graph `deep`
    keeps its features, and the `shallow<k>` rows behind it take them. A Guidance serves one run:
    its features never reach another batch.
    """

    def __init__(
        self,
        open_session: Open,
        uncond: Array | None,
        cond: Array,
        conditions: Conditions = Conditions(),
        *,
        halves: Halves = "together",
        rescale: float = 0.0,
    ) -> None:
        self._open, self._uncond, self._cond = open_session, uncond, cond
        self._conditions = conditions
        self.guided: tuple[Half, ...] = ("both",) if halves == "together" else ("uncond", "cond")
        self._rescale = rescale
        self._bound: dict[Half, Session] = {}
        self._graphs: dict[tuple[Half, str], Session] = {}
        self._cached: dict[Corner, Cached] = {}

    @property
    def channels(self) -> Array | None:
        """What is joined behind x, [B, C, h, w]."""
        return self._conditions.channels

    def sessions(self, table: Table, state: State) -> dict[tuple[Half, str], Session]:
        """All that the rows from there on run, opened now: (half, graph) -> session."""
        wanted = {
            (half, row.graph)
            for row in table.rows()[state.rows :]
            for half in (self.guided if row.guidance != 1.0 else ("cond",))
        }
        return {
            (half, graph): self._session(half, graph, *state.x.shape[2:])
            for half, graph in sorted(wanted)
        }

    @property
    def cached_from(self) -> int | None:
        """The row whose features are held, None before the first one: a saved run that goes on
        without them must begin where `presets.check_start` allows it."""
        return max((kept.row for kept in self._cached.values()), default=None)

    def features(self) -> dict[str, Array]:
        """What is held for shallow rows: for a run that is saved.

        `both.0,0.features0` -> array: half, corner of the window, name
        """
        return {
            f"{half}.{corner[0]},{corner[1]}.{name}": np.asarray(value)
            for corner, kept in self._cached.items()
            for half, arrays in kept.halves.items()
            for name, value in arrays.items()
        }

    def restore(self, rows: int, features: Mapping[str, Array]) -> None:
        """Hold what `features` gave in another process, after that many rows."""
        found: dict[Corner, dict[Half, dict[str, Array]]] = {}
        for key, value in features.items():
            half, corner, name = key.split(".", 2)
            top, left = map(int, corner.split(","))
            halves = found.setdefault((top, left), {})
            halves.setdefault(cast("Half", half), {})[name] = value
        self._cached = {corner: Cached(rows - 1, halves) for corner, halves in found.items()}

    def __call__(self, x: Array, row: Row) -> Array:
        return self.part(x, row, WHOLE)

    def part(self, x: Array, row: Row, window: Window) -> Array:
        """The same for x that is a window of the latent, with the channels of that window.

        Windows of one Guidance have one size: the text is held once, for all of them. Features are
        held for each.
        """
        guided = row.guidance != 1.0
        halves = self.guided if guided else ("cond",)
        beside = self._conditions.channels
        sample = x if beside is None else np.concatenate([x, beside[..., *window]], axis=1)
        corner = _corner(window)
        results = {half: self._run(half, sample, row, corner) for half in halves}
        if row.graph.startswith("deep"):
            kept = {h: _features(r) for h, r in results.items()}
            self._cached[corner] = Cached(row.index, kept)
        out = results[halves[-1]][OUT]
        if guided:
            if "uncond" in results:
                uncond, cond = results["uncond"][OUT], out
            else:
                uncond, cond = out[: len(x)], out[len(x) :]
            out = self._combined(uncond, cond, row.guidance)
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

    def _run(self, half: Half, sample: Array, row: Row, corner: Corner) -> dict[str, Array]:
        """One call of the row's graph."""
        x = np.concatenate([sample, sample]) if half == "both" else sample
        session = self._session(half, row.graph, *x.shape[2:])
        feeds = {"sample": x, "timestep": np.full(len(x), row.t, np.float32)}
        if row.graph.startswith("shallow"):
            wanted = session.spec.inputs[-1].name
            feeds[wanted] = self._features(half, row, len(sample), corner)[wanted]
        return session(feeds)

    def _features(self, half: Half, row: Row, batch: int, corner: Corner) -> Mapping[str, Array]:
        """What the last deep row gave for this half."""
        cached = self._cached.get(corner)
        assert cached is not None, f"row {row.index} is shallow, and no deep row ran before it"
        assert cached.row < row.index, f"features of row {cached.row} are left from another run"
        if half in cached.halves:
            return cached.halves[half]
        assert half == "cond", f"row {row.index} runs more halves than row {cached.row} did"
        assert "both" in cached.halves, "a deep row runs the conditional half"
        return {name: x[batch:] for name, x in cached.halves["both"].items()}

    def _combined(self, uncond: Array, cond: Array, scale: float) -> Array:
        """u + s (c - u); with phi, part of the way back to the deviation of c.

        source      Lin et al. 2023, arXiv:2305.08891, equations 15 and 16
        """
        before = _deviation(cond) if self._rescale != 0.0 else None
        out = cond
        out -= uncond
        out *= scale
        out += uncond
        if before is not None:
            phi = np.asarray(self._rescale, out.dtype)
            out *= phi * (before / _deviation(out)) + (1 - phi)
        return out

    def _session(self, half: Half, graph: str, h: int, w: int) -> Session:
        """The UNet with the text held fixed, opened when the first row needs it."""
        if (half, graph) not in self._graphs:
            if half not in self._bound:
                text = self._text(half)
                held = {"encoder_hidden_states": text, **self._labels(half)}
                dims = {"B": len(text), "T": text.shape[1], "h": h, "w": w}
                session = self._open("unet", dims, paired=half == "both")
                self._bound[half] = session.bind(held)
            self._graphs[half, graph] = self._bound[half].graph(graph)
        return self._graphs[half, graph]

    def _text(self, half: Half) -> Array:
        if half == "cond":
            return self._cond
        assert self._uncond is not None, "a guided row needs the unconditional text"
        return self._uncond if half == "uncond" else np.concatenate([self._uncond, self._cond])

    def _labels(self, half: Half) -> dict[str, Array]:
        labels, without = self._conditions.labels, self._conditions.unlabelled
        if labels is None:
            return {}
        uncond = labels if without is None else without
        chosen = {"cond": labels, "uncond": uncond}
        return {
            "class_labels": np.concatenate([uncond, labels]) if half == "both" else chosen[half]
        }


def _corner(window: Window) -> Corner:
    rows, columns = window
    return rows.start or 0, columns.start or 0


def _features(results: Mapping[str, Array]) -> dict[str, Array]:
    return {name: x for name, x in results.items() if name != OUT}


def _deviation(x: Array) -> Array:
    """Of each picture, [B, 1, 1, 1]."""
    return np.asarray(x.std(axis=(1, 2, 3), keepdims=True))
