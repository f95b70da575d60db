"""A large picture in overlapping tiles: geometry, blending, and a network call over all of them.

All tiles of a grid have one size, so that one compiled shape serves them. Weights are smooth ramps
over each overlap; at every cell they sum to 1, so that blending needs no second buffer: never more
than the result and one tile is in memory.

source      MultiDiffusion: Bar-Tal et al. 2023, arXiv:2302.08113, equation 5, for `Tiled`
checked by  tests/unit/test_tiles.py, tests/contract/test_tiling.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from .ports import Array, Floats
from .table import Row

Window = tuple[slice, slice]
Part = Callable[[Array, Row, Window], Array]

WHOLE: Window = (slice(None), slice(None))


@dataclass(frozen=True)
class Axis:
    """One direction: `total` cells, tiles of `side` cells that begin at `starts`, ascending."""

    total: int
    side: int
    starts: tuple[int, ...]

    @classmethod
    def over(cls, total: int, tile: int, overlap: int) -> Axis:
        """The fewest tiles of min(tile, total) cells that share at least `overlap`, evenly spread.

        0 <= overlap < tile. The first begins at 0 and the last ends at `total`: none looks outside.
        """
        assert total >= 1, f"{total} cells"
        assert 0 <= overlap < tile, f"overlap {overlap} in a tile of {tile}"
        if tile >= total:
            return cls(total, total, (0,))
        count = -(-(total - overlap) // (tile - overlap))
        starts = tuple(k * (total - tile) // (count - 1) for k in range(count))
        return cls(total, tile, starts)

    def weights(self, scale: int = 1) -> list[Floats]:
        """For each tile float32 [side * scale]; where tiles meet they sum to 1.

        A ramp is 3u^2 - 2u^3 over the cells shared with the neighbour: no edge in value or slope.
        Where more than two tiles meet, the products of ramps are normalised.
        """
        side, total = self.side * scale, self.total * scale
        place = np.arange(side) + 0.5
        tiles = [np.ones(side) for _ in self.starts]
        for k in range(len(self.starts) - 1):
            shared = (self.starts[k] + self.side - self.starts[k + 1]) * scale
            if shared > 0:
                rise = np.clip(place / shared, 0, 1)
                rise *= rise * (3 - 2 * rise)
                tiles[k + 1] *= rise
                tiles[k] *= rise[::-1]
        sums = np.zeros(total)
        for start, weight in zip(self.starts, tiles, strict=True):
            sums[start * scale : start * scale + side] += weight
        return [
            (weight / sums[start * scale : start * scale + side]).astype(np.float32)
            for start, weight in zip(self.starts, tiles, strict=True)
        ]


@dataclass(frozen=True)
class Grid:
    """Tiles of `height` x `width` cells, in cells of the latent."""

    rows: Axis
    columns: Axis

    @classmethod
    def over(cls, height: int, width: int, tile: int | None, overlap: int | None = None) -> Grid:
        """tile None: one tile, the whole. overlap None: `overlap_of(tile)`."""
        side = max(height, width) if tile is None else tile
        shared = overlap_of(side) if overlap is None else overlap
        return cls(Axis.over(height, side, shared), Axis.over(width, side, shared))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def windows(self, scale: int = 1) -> Iterator[Window]:
        """Where the tiles lie, row by row, in cells times `scale`."""
        for y in self.rows.starts:
            for x in self.columns.starts:
                yield _span(y, self.rows.side, scale), _span(x, self.columns.side, scale)


class Mosaic:
    """Blends the tiles of a grid: `add` each with its window, then read `result`.

    shape       of the result, its last two axes the grid's sides times `scale`
    """

    def __init__(self, grid: Grid, shape: tuple[int, ...], dtype: DTypeLike, scale: int = 1):
        self.result = np.zeros(shape, dtype)
        self._down = dict(zip(_begins(grid.rows, scale), grid.rows.weights(scale), strict=True))
        columns = grid.columns
        self._across = dict(zip(_begins(columns, scale), columns.weights(scale), strict=True))

    def add(self, tile: Array, window: Window) -> None:
        rows, columns = window
        weighted = tile * self._down[rows.start][:, None]
        weighted *= self._across[columns.start]
        self.result[..., rows, columns] += weighted


class Tiled:
    """`predict` for the loop: the network on overlapping tiles of x, its answers blended.

    part        (x of the window, row, window) -> out; `Guidance.part` is one. All windows have one
                size, so it holds its text once
    tile        side of a tile in latent cells, a multiple of what the network takes
    With one tile the answer is `part`'s own, bit for bit.
    """

    def __init__(self, part: Part, tile: int, overlap: int | None = None) -> None:
        self._part, self._tile, self._overlap = part, tile, overlap

    def __call__(self, x: Array, row: Row) -> Array:
        grid = Grid.over(x.shape[-2], x.shape[-1], self._tile, self._overlap)
        if len(grid) == 1:
            return self._part(x, row, WHOLE)
        mosaic = Mosaic(grid, x.shape, x.dtype)
        for rows, columns in grid.windows():
            mosaic.add(self._part(x[..., rows, columns], row, (rows, columns)), (rows, columns))
        return mosaic.result


def overlap_of(tile: int) -> int:
    """A quarter of a tile: docs/numerics.md has what other shares bring."""
    return tile // 4


def _span(start: int, side: int, scale: int) -> slice:
    return slice(start * scale, (start + side) * scale)


def _begins(axis: Axis, scale: int) -> list[int]:
    return [start * scale for start in axis.starts]
