"""What the networks share: one spelling each of attention, upsampling and computed tables.

The spellings are chosen for the tracer and for the engines' pattern matchers. All networks use
these, so that a graph pass or an engine sees one form only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)

_FUSED: ContextVar[bool] = ContextVar("fused attention", default=False)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, `attention` is torch's own kernel, which never writes the scores down.

    For running the networks, in this thread or task alone; a trace wants the plain spelling.
    """
    before = _FUSED.set(True)
    try:
        yield
    finally:
        _FUSED.reset(before)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; no node in the trace when it already is."""
    return x if x.dtype == dtype else x.to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v, safe in half precision.

    q           [B, T, heads * d]
    k, v        [B, S, heads * d]
    bias        float32, broadcasts to [B, heads, T, S]
    returns     [B, T, heads * d]

    q is scaled before the product: unscaled scores of SD 2.1 overflow float16. Scores of a half
    precision product are widened for the softmax; in float32 and float64 nothing is cast.
    """
    batch, d = q.shape[0], q.shape[-1] // heads
    q = (q * d**-0.5).reshape(batch, -1, heads, d).transpose(1, 2)  # [B, heads, T, d]
    k = k.reshape(batch, -1, heads, d).transpose(1, 2)
    v = v.reshape(batch, -1, heads, d).transpose(1, 2)
    if bias is None and _FUSED.get():
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # scores in float32 inside
        return out.transpose(1, 2).reshape(batch, -1, heads * d)
    scores = q @ k.transpose(-1, -2)
    if scores.dtype in HALF:
        scores = scores.float()
    if bias is not None:
        scores = scores + bias
    out = cast(scores.softmax(dim=-1), v.dtype) @ v
    return out.transpose(1, 2).reshape(batch, -1, heads * d)


def upsample2(x: Tensor) -> Tensor:
    """Nearest neighbour, twice the size: [B, C, h, w] -> [B, C, 2h, 2w]."""
    # A constant scale factor, not a size: the trace keeps a Resize with constant scales.
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Table(nn.Module):
    """A float32 constant: made by `make`, never stored in a checkpoint, exact in every dtype.

    It follows the module's device but not its dtype, and is made anew when the module is
    converted or materialised from the meta device, where a plain buffer would be rounded or lost.
    """

    value: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("value", make().to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.value = self.make().to(self.value.device)
        return self

    def forward(self) -> Tensor:
        return self.value


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON types: tuples become lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }


def unplain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `plain`: lists become tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
