"""The text tower (OpenCLIP layout, penultimate layer), written to be traced.

Names are those of the original checkpoint under `PREFIX`, without the last block,
`text_projection` and `logit_scale`, which Stable Diffusion 2 never runs.

source      Radford et al. 2021, arXiv:2103.00020; Cherti et al. 2022, arXiv:2212.07143
checked by  tests/golden/test_networks.py (text_tower), tests/golden/test_key_lists.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Table, attention, plain

PREFIX = "cond_stage_model.model."


@dataclass(frozen=True)
class TextConfig:
    """Widths of a text tower. `layers` counts the blocks that run: 23 of the 24 stored."""

    width: int = 1024
    layers: int = 23
    heads: int = 16
    vocab_size: int = 49408
    context_length: int = 77

    @classmethod
    def from_ldm(cls, text: Mapping[str, Any]) -> Self:
        """From the facts of a tower: `layers_used`, and the other names as they are here."""
        if not str(text.get("activation", "gelu")).startswith("gelu"):
            raise ValueError(f"text activation {text['activation']!r}, expected exact gelu")
        return cls(
            width=text["width"],
            layers=text["layers_used"],
            heads=text["heads"],
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. An unknown name is a TypeError."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return plain(self)


class SelfAttention(nn.Module):
    """x [B, T, C], bias [T, T] or none -> [B, T, C]. q, k and v are one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        out: Tensor = self.out_proj(attention(q, k, v, self.heads, bias))
        return out


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))  # exact erf, not "quick"
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), bias)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(config.width, config.heads) for _ in range(config.layers)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, bias)
        return x


class TextEncoder(nn.Module):
    """Tokens -> what the UNet attends to.

    input_ids   int64 [B, context_length]
    returns     [B, context_length, width]: all blocks that run, then `ln_final`

    The mask is causal only: pad positions are inputs like any other, and the UNet sees them.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        self.causal = Table(partial(_causal, config.context_length))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) + self.positional_embedding
        out: Tensor = self.ln_final(self.transformer(x, self.causal()))
        return out


def _causal(length: int) -> Tensor:
    """[length, length]: 0 on and below the diagonal, -inf above."""
    return torch.full((length, length), float("-inf"), device="cpu").triu(1)
