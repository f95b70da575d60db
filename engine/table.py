"""A sampler as data: one row for each network call.

    out_i  = predict(x_i, t_i)
    m_i    = px_i * x_i + po_i * out_i
    x_i+1  = sum_k a[i,k] * x_(i-k)  +  sum_k b[i,k] * m_(i-k)  +  n_i * noise_i

x is what the network eats: alpha * x0 + sigma * noise. The prediction type lives in px and po
alone. m is x0 ("data") or the noise ("noise"), as the solver's paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .levels import Doubles

HISTORY = 5  # k = 0..4: what PLMS needs after its extra row; UniPC of order 3 needs 4

Prediction = Literal["eps", "v"]
Quantity = Literal["data", "noise"]


@dataclass(frozen=True)
class Row:
    """What `predict` is told about a row."""

    index: int
    t: float
    guidance: float
    graph: str


@dataclass(frozen=True)
class Table:
    """R rows. All arrays are float64 and belong to the table.

    t, px, po, n        [R]
    a, b                [R, HISTORY]: weights of x_(i-k) and m_(i-k)
    alphas, sigmas      [R+1]: level of x before each row, and of the last x
    intervals           [R, 2]: the two levels, sigma / alpha, between which the row's noise falls,
                        for a noise source that knows intervals (a Brownian path)
    quantity            what m is
    guidance            [R]: scale of the guidance; 1 means that one half runs
    graphs              [R]: the graph of the network that runs
    start_noise         how much unit noise the first x holds
    start_scale         how much of a picture's latent it holds
    """

    t: Doubles
    px: Doubles
    po: Doubles
    a: Doubles
    b: Doubles
    n: Doubles
    alphas: Doubles
    sigmas: Doubles
    intervals: Doubles
    quantity: Quantity
    guidance: Doubles
    graphs: tuple[str, ...]
    start_noise: float
    start_scale: float = 0.0

    def __post_init__(self) -> None:
        rows = len(self.t)
        shapes = {
            "px": (rows,), "po": (rows,), "n": (rows,), "guidance": (rows,),
            "a": (rows, HISTORY), "b": (rows, HISTORY),
            "alphas": (rows + 1,), "sigmas": (rows + 1,), "intervals": (rows, 2),
        }  # fmt: skip
        for name, shape in shapes.items():
            assert getattr(self, name).shape == shape, f"{name} must be {shape}"
        assert len(self.graphs) == rows, f"graphs must have {rows} entries"

    def __len__(self) -> int:
        return len(self.t)

    def rows(self) -> list[Row]:
        columns = zip(self.t.tolist(), self.guidance.tolist(), self.graphs, strict=True)
        return [Row(i, *row) for i, row in enumerate(columns)]

    def guided(self, scale: float) -> Table:
        """The same rows with guidance of one scale in all of them."""
        return replace(self, guidance=np.full(len(self), float(scale)))

    @property
    def depth(self) -> int:
        """How many x and m the deepest row reaches back to, itself included."""
        used = np.flatnonzero((self.a != 0).any(axis=0) | (self.b != 0).any(axis=0))
        return int(used[-1]) + 1

    def weights(self) -> Doubles:
        """Weights over the histories of x and of raw network outputs, [R, 2 * depth].

        Column k weighs x_(i-k), column depth + k weighs out_(i-k): px and po are folded in, so
        that a row of the loop is one dot product.
        """
        depth, rows = self.depth, len(self)
        folded = np.zeros((rows, 2 * depth))
        for k in range(depth):
            now = np.arange(k, rows)
            folded[now, k] = self.a[now, k] + self.b[now, k] * self.px[now - k]
            folded[now, depth + k] = self.b[now, k] * self.po[now - k]
        return folded


def convert(prediction: Prediction, quantity: Quantity, alpha: Doubles, sigma: Doubles) -> Doubles:
    """(px, po) stacked, [2, R]: what turns (x, out) into `quantity`.

    eps model: x0 = (x - sigma eps) / alpha
    v model: x0 = alpha x - sigma v, eps = alpha v + sigma x
    source: Salimans & Ho 2022, arXiv:2202.00512, appendix D
    """
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    return np.stack(
        {
            ("eps", "data"): (1 / alpha, -sigma / alpha),
            ("eps", "noise"): (zero, one),
            ("v", "data"): (alpha, -sigma),
            ("v", "noise"): (sigma, alpha),
        }[prediction, quantity]
    )
