"""The image tower of unCLIP (CLIP's visual half: ViT-H/14, ViT-L/14), written to be traced.

Names are those of the original checkpoint under `PREFIX`. The text half that some files store
beside it is never run.

source      Dosovitskiy et al. 2020, arXiv:2010.11929; Radford et al. 2021, arXiv:2103.00020
checked by  tests/golden/test_companions.py (pipeline_unclip_h, pipeline_unclip_l; open_clip's own)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import cast, plain
from .text import SelfAttention

PREFIX = "embedder.model.visual."


@dataclass(frozen=True)
class ImageConfig:
    """Widths of an image tower.

    size, patch  pixels of a side
    embedding    width of what it gives
    activation   "gelu" (the exact erf form), or OpenAI's "quick_gelu"
    """

    width: int = 1280
    layers: int = 32
    heads: int = 16
    patch: int = 14
    size: int = 224
    embedding: int = 1024
    activation: Literal["gelu", "quick_gelu"] = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation {self.activation!r}, expected gelu or quick_gelu")
        if self.size % self.patch or self.width % self.heads:
            raise ValueError("patches divide the picture, and heads the width, without a rest")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. An unknown name is a TypeError."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return plain(self)


class MLP(nn.Module):
    def __init__(self, width: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        out: Tensor = self.c_proj(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
        return out


class Block(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.activation == "quick_gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ImageEncoder(nn.Module):
    """Picture -> embedding.

    pixels      [B, 3, size, size], normalised by CLIP's mean and deviation
    returns     [B, embedding], not brought to length 1
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patches = config.width, (config.size // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + patches, width))
        self.proj = nn.Parameter(torch.zeros(width, config.embedding))
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(cast(pixels, self.proj.dtype)).flatten(2).transpose(1, 2)
        start = self.class_embedding.reshape(1, 1, -1).expand(pixels.shape[0], -1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        embedding: Tensor = (self.ln_post(x[:, :1]) @ self.proj).squeeze(1)
        return embedding
