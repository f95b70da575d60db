"""The one loop: it executes any table and knows no solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .ports import Array, State
from .table import Row, Table

Predict = Callable[[Array, Row], Array]
Settle = Callable[[Array, Row], Array]


class Step(NamedTuple):
    """What one row did: `ports.Step`.

    rings   the loop's own history, which the next row overwrites
    """

    row: Row
    x: Array
    before: Array
    out: Array
    rings: Array

    def state(self) -> State:
        """A copy from which the run can go on; to be taken before the next step is asked for."""
        return State(self.row.index + 1, self.x.copy(), self.rings.copy())


def denoise(
    table: Table,
    predict: Predict,
    start: Array | State,
    noise: Callable[[], Array] | None = None,
    settle: Settle | None = None,
) -> Iterator[Step]:
    """Run the table's rows, in the dtype of the first x (float32; float64 for laws).

    predict     (x, row) -> out, of x's shape
    start       the first x; or the State that a run was stopped in, to run the rest of it: with
                the noise and the predictor as they were, the same run bit for bit
    noise       draws unit noise of x's shape; called once for each row with n != 0, in order
    settle      (x, row) -> x: has the last word on the x after a row (inpainting by blending)
    yields      a Step after each row

    The histories of x and of outputs are one matrix, a ring in each half, so a row is a product of
    a weight vector with it. Slots not yet written hold zeros and have weight zero.
    """
    state = start if isinstance(start, State) else State.fresh(table, start)
    x, depth, dtype = state.x, table.depth, state.x.dtype
    assert state.history.shape == (2 * depth, x.size), "a state of another table"
    history = state.history.copy()
    weights = _rolled(table.weights(), depth).astype(dtype)
    fresh = table.n.astype(dtype)
    for row in table.rows()[state.rows :]:
        slot = row.index % depth
        out = predict(x, row)
        history[slot] = x.ravel()
        history[depth + slot] = out.ravel()
        after = (weights[row.index] @ history).reshape(x.shape)
        if fresh[row.index] != 0:
            assert noise is not None, "this table needs noise"
            after += fresh[row.index] * noise()
        if settle is not None:
            after = settle(after, row)
        yield Step(row, after, x, out, history)
        x = after


def _rolled(weights: Array, depth: int) -> Array:
    """Weights by ring slot, not by age: what has age k at row i lies in slot (i - k) % depth."""
    ages = (np.arange(len(weights))[:, None] - np.arange(depth)) % depth  # slot s holds age (i - s)
    return np.concatenate(
        [np.take_along_axis(half, ages, axis=1) for half in np.split(weights, 2, axis=1)], axis=1
    )
