"""A table run by a device: what every `denoiser` of a backend does alike.

The host draws noise, enqueues rows and hands out Steps; it waits for nothing, unless somebody reads
a Step. A device brings a `Board`, which holds the run's memory. `engine.loop.denoise` is what the
result must equal, to the rounding of float32.

checked by  tests/unit/test_denoise.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np

from ..engine.errors import NumericsError, SdengineError
from ..engine.ports import Array, Half, Job, State
from ..engine.table import Row, Table

LEAST_SLOTS = 3  # a caller's loop variable still holds row i - 1 while row i is enqueued


class Board(Protocol):
    """A run's memory on a device: rings of x and of guided outputs, and the networks' own.

    x_i lies in slot i % slots of the one ring, the output of row i in slot i % slots of the other.
    """

    slots: int

    def noise(self, values: Array) -> None:
        """What the next row adds; read from `values` before this returns."""
        ...

    def row(self, row: Row) -> None:
        """Enqueue a row; `before` is done when it begins."""
        ...

    def rings(self) -> Rings:
        """Wait for all that was enqueued, and fetch."""
        ...

    def close(self) -> None: ...


class Rings(NamedTuple):
    """xs, outs    [slots, x.size]
    bad         the first row whose output was not finite; None: there is none
    """

    xs: Array
    outs: Array
    bad: int | None


class DeviceStep:
    """`ports.Step` of a row that a device runs; arrays are fetched when first read."""

    def __init__(self, board: Board, table: Table, row: Row, shape: tuple[int, ...]) -> None:
        self._table, self._row, self._shape = table, row, shape
        self._board: Board | None = board  # let go of when all is fetched
        self._state: State | None = None
        self._before = self._out = np.empty(0)
        self._error: SdengineError | None = None

    @property
    def row(self) -> Row:
        return self._row

    @property
    def x(self) -> Array:
        return self.state().x

    @property
    def before(self) -> Array:
        self.state()
        return self._before

    @property
    def out(self) -> Array:
        self.state()
        return self._out

    def state(self) -> State:
        """Raises NumericsError, BackendError: what befell the device until this row."""
        self.fetch()
        if self._state is None:
            assert self._error is not None, "what cannot be fetched says why"
            raise self._error
        return self._state

    def fetch(self) -> None:
        """Read while it is there. What fails is raised when somebody asks for it."""
        if self._board is None:
            return
        try:
            self.take(self._board.rings())
        except SdengineError as error:
            self._board, self._error = None, error

    def take(self, rings: Rings) -> None:
        """Out of rings that this row is still in."""
        if self._board is None:
            return
        index, depth, slots = self._row.index, self._table.depth, self._board.slots
        self._board = None
        if rings.bad is not None and rings.bad <= index:
            self._error = not_finite(self._table, rings.bad)
            return
        history = np.zeros((2 * depth, rings.xs.shape[1]), np.float32)
        for past in range(max(0, index - depth + 1), index + 1):
            history[past % depth] = rings.xs[past % slots]
            history[depth + past % depth] = rings.outs[past % slots]
        self._before = rings.xs[index % slots].reshape(self._shape)
        self._out = rings.outs[index % slots].reshape(self._shape)
        x = rings.xs[(index + 1) % slots].reshape(self._shape)
        self._state = State(index + 1, x, history)


def denoise(job: Job, board: Board) -> Iterator[DeviceStep]:
    """Run the rows of a job on a board, which is closed at the end.

    raises  NumericsError, BackendError: at the end of the run, or when a Step is read
    """
    table, slots = job.table, board.slots
    assert slots >= slots_of(table), f"{slots} slots for a table of depth {table.depth}"
    alive: WeakValueDictionary[int, DeviceStep] = WeakValueDictionary()
    try:
        for row in table.rows()[job.start.rows :]:
            lost = alive.pop(row.index + 1 - slots, None)
            if lost is not None:  # somebody keeps a step that this row writes over
                lost.fetch()
            if table.n[row.index] != 0:
                board.noise(job.noise())
            board.row(row)
            step = alive[row.index] = DeviceStep(board, table, row, job.start.x.shape)
            yield step
            del step
        rings = board.rings()
        for kept in alive.values():
            kept.take(rings)
        if rings.bad is not None:
            raise not_finite(table, rings.bad)
    finally:
        for step in list(alive.values()):
            step.fetch()
        board.close()


def slots_of(table: Table) -> int:
    return max(table.depth + 1, LEAST_SLOTS)


def halves_of(job: Job, row: Row) -> tuple[Half, ...]:
    return job.halves if row.guidance != 1.0 else ("cond",)


def not_finite(table: Table, index: int) -> NumericsError:
    row = table.rows()[index]
    return NumericsError(
        f"the UNet answered NaN or infinity at step {row.index} (timestep {row.t:g},"
        f" guidance {row.guidance:g})",
        hint="the precision is too low for this model: run again with --precision f32",
    )
