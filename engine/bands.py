"""A network in bands: each runs on all tiles of the whole map before the next one begins.

A VAE's group norms take mean and variance over the whole picture; a tile that takes its own has
other colours. So the network is cut at its norms (docs/bundle-format.md, `inner` and `outer<k>`):
a band leads from one norm to the next, and the statistics that a norm needs are known once the
band before it has been run on all tiles. Tiles have a rim of two cells, as far as a band looks:
what comes out is what the whole gives, but for rounding.

Between bands whole maps lie in memory, two of the picture's own size at most. They are kept in
half precision, in a scale of their own: 70 dB (docs/numerics.md).

checked by  tests/unit/test_bands.py, tests/contract/test_tiling.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import NumericsError
from .ports import Array, Floats, Open, Session
from .tiles import Axis, Window

RIM = 2  # cells of a map, as far as a band looks beyond one; tiles begin at multiples of it
FEW = 16  # channels: maps that have no more, pictures and latents, stay in float32
PEAK = 8  # a map's largest value is brought to 2**8 at first: half precision ends at 2**16


@dataclass(frozen=True)
class Tile:
    """window: what a band is shown of its map. core: what is its own, in no other tile's core."""

    window: Window
    core: Window


def tiles(height: int, width: int, side: int) -> Iterator[Tile]:
    """Tiles of one size, at most side x side cells: their cores cover a map, each cell once.

    Sides are multiples of RIM. A core lies RIM cells or more from the edges of its window, but for
    those that are the map's own.
    """
    down, across = (list(_spans(total, side)) for total in (height, width))
    for rows, own_rows in down:
        for columns, own_columns in across:
            yield Tile((rows, columns), (own_rows, own_columns))


def _spans(total: int, side: int) -> Iterator[tuple[slice, slice]]:
    """(window, core) along one direction."""
    assert total % RIM == side % RIM == 0, f"{total} cells in tiles of {side}"
    axis = Axis.over(total // RIM, side // RIM, 2)
    begin = 0
    for k, start in enumerate(axis.starts):
        last = k + 1 == len(axis.starts)
        shared = 0 if last else start + axis.side - axis.starts[k + 1]
        end = axis.total if last else start + axis.side - shared // 2
        yield _scaled(start, start + axis.side), _scaled(begin, end)
        begin = end


def _scaled(start: int, end: int) -> slice:
    return slice(start * RIM, end * RIM)


class Map:
    """A whole map [C, H, W], written and read in windows. Wide ones lie in half precision.

    The scale of those is a power of two, so that it costs no rounding, chosen by the first window
    that is written, and again where a later one outgrows it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._half = shape[0] > FEW
        self._data = np.zeros(shape, np.float16 if self._half else np.float32)
        self._scale: np.float32 | None = None

    @classmethod
    def of(cls, values: Floats) -> Map:
        made = cls(values.shape)
        made.put((slice(None), slice(None)), values)
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    def put(self, window: Window, values: Floats) -> None:
        if not self._half:
            self._data[:, *window] = values
            return
        peak = float(np.abs(values).max())
        if not np.isfinite(peak):
            raise NumericsError(
                "the VAE gave NaN or infinity in a tile",
                hint="the precision is too low for this model: run again with --precision f32",
            )
        if self._scale is None or peak * self._scale > np.finfo(np.float16).max:
            scale = np.float32(2.0 ** (PEAK - np.frexp(peak)[1]))
            if self._scale is not None:
                self._data *= np.float16(scale / self._scale)
            self._scale = scale
        self._data[:, *window] = values * self._scale

    def get(self, window: Window) -> Floats:
        values = self._data[:, *window].astype(np.float32)
        if self._scale is not None:
            values /= self._scale
        return values

    def whole(self) -> Floats:
        return self.get((slice(None), slice(None)))


@dataclass
class Statistics:
    """Mean and variance of each channel of a map, gathered core by core, in float64.

    source      Chan, Golub, LeVeque 1979, equations 1.5: means and sums of squares of parts
    """

    count: int = 0
    mean: Array = field(default_factory=lambda: np.zeros(0))
    squares: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, values: Floats) -> None:
        """float32 [C, h, w], contiguous"""
        flat = values.reshape(len(values), -1)
        count = flat.shape[1]
        mean = flat.mean(axis=1)
        centred = flat - mean[:, None]
        squares = np.einsum("ci,ci->c", centred, centred).astype(np.float64)
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean.astype(np.float64), squares
            return
        total = self.count + count
        apart = mean - self.mean
        self.mean += apart * (count / total)
        self.squares += squares + apart**2 * (self.count * count / total)
        self.count = total

    def grouped(self, groups: int) -> Floats:
        """float32 [1, groups, 3]: the mean to eight bits, the rest of it, the variance."""
        means = self.mean.reshape(groups, -1)
        mean = means.mean(axis=1)
        within = (self.squares / self.count).reshape(groups, -1).mean(axis=1)
        variance = within + ((means - mean[:, None]) ** 2).mean(axis=1)
        high = _eight_bits(mean)
        return np.stack([high, mean - high, variance], axis=1)[None].astype(np.float32)


def _eight_bits(values: Array) -> Array:
    """Rounded to what bfloat16 holds, so that an engine that computes in it reads the same."""
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(mantissa * 256), exponent - 8))


def run(
    open_session: Open, component: str, names: Sequence[str], given: Floats, tile: int, cells: int
) -> Floats:
    """The network on one picture or latent, float32 [C, H, W], without the axis of the batch.

    names       of its bands, in order; `inner` runs on the whole
    tile        side of a tile in latent cells, even
    cells       height of the latent: a map n times as high has tiles n times as large
    raises      NumericsError: NaN or infinity
    """
    held = {"": Map.of(given)}  # before the first band: what the network takes, by whatever name
    statistics = Statistics()
    for name in names:
        first = next(iter(held.values()))
        height, width = first.shape[1:]
        side = max(height, width) if name == "inner" else tile * height // cells
        rows, columns = min(side, height), min(side, width)
        dims = {"B": 1, "h": rows, "w": columns, "H": rows, "W": columns}
        session = open_session(component, dims).graph(name)
        if "" in held:
            held = {session.spec.inputs[0].name: held[""]}
        if name == "inner":
            held = {n: Map.of(x) for n, x in _call(session, held, None, None).items()}
            session.close()
            continue
        held, statistics = _band(session, held, statistics, side)
        session.close()
    (last,) = held.values()
    return last.whole()


def _band(
    session: Session, held: dict[str, Map], before: Statistics, side: int
) -> tuple[dict[str, Map], Statistics]:
    """One band on all tiles: the maps that are held behind it, and statistics of its first.

    A map that is only looked at cell by cell, `skip`, makes room for one of its shape.
    """
    taken = {t.name: t for t in session.spec.inputs}
    groups = taken.pop("statistics").shape[1] if "statistics" in taken else None
    given = None if groups is None else before.grouped(int(groups))
    looked_at = held[session.spec.inputs[0].name]
    made: dict[str, Map] = {}
    found = Statistics()
    height, width = looked_at.shape[1:]
    for tile in tiles(height, width, side):
        results = _call(session, {n: held[n] for n in taken}, given, tile.window)
        for i, (name, values) in enumerate(results.items()):
            core = _within(tile, values.shape[1] / (tile.window[0].stop - tile.window[0].start))
            own = np.ascontiguousarray(values[:, *core.window])
            if i == 0:
                found.add(own)
            if name == "seen":
                continue
            if name not in made:
                made[name] = _room(held, name, values, tile, looked_at)
            made[name].put(core.core, own)
    if not made:
        return held, found
    return ({"skip": held["x"], **made} if "h" in made else made), found


def _within(tile: Tile, times: float) -> Tile:
    """For results `times` as large: the core inside the window, and in the whole map."""
    inside = (
        slice(core.start - window.start, core.stop - window.start)
        for core, window in zip(tile.core, tile.window, strict=True)
    )
    return Tile(_times(tuple(inside), times), _times(tile.core, times))


def _times(window: tuple[slice, ...], times: float) -> Window:
    rows, columns = (slice(int(s.start * times), int(s.stop * times)) for s in window)
    return rows, columns


def _room(held: dict[str, Map], name: str, values: Floats, tile: Tile, like: Map) -> Map:
    """The map that a band's results go into."""
    rows = tile.window[0].stop - tile.window[0].start
    shape = (len(values), *(n * values.shape[1] // rows for n in like.shape[1:]))
    skip = held.get("skip")
    return skip if name == "x" and skip is not None and skip.shape == shape else Map(shape)


def _call(
    session: Session, maps: dict[str, Map], statistics: Floats | None, window: Window | None
) -> dict[str, Floats]:
    """The results for one picture, in the order of the graph's outputs."""
    feeds: dict[str, Array] = {
        name: (one.whole() if window is None else one.get(window))[None]
        for name, one in maps.items()
    }
    if statistics is not None:
        feeds["statistics"] = statistics
    results = session(feeds)
    return {t.name: results[t.name][0] for t in session.spec.outputs}
