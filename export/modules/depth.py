"""The depth network of Stable Diffusion 2 (MiDaS DPT-hybrid), written to be traced.

A ResNet whose convolutions are weight-standardised makes the patches of a vision transformer; four
taps, two of the one and two of the other, are fused from the coarsest to the finest. Names are
those of the original checkpoint under `PREFIX`, without what is stored and never run: the
classifier, the transformer's last norm, and the first residual unit of the coarsest fusion.

source      Ranftl et al. 2021, arXiv:2103.13413; Kolesnikov et al. 2020, arXiv:1912.11370;
            Qiao et al. 2019, arXiv:1903.10520 (weight standardisation)
checked by  tests/golden/test_companions.py (depth_small, depth_full), against timm's backbone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import HALF, attention, cast, plain, unplain

PREFIX = "depth_model.model."
MULTIPLE = 32  # pixels: the coarsest map has one cell for so many


@dataclass(frozen=True)
class DepthConfig:
    """Widths of a depth network.

    stages      residual blocks of each ResNet stage; channels: what each gives
    bottleneck  channels inside the blocks of each stage
    hooks       transformer blocks whose results are tapped
    grid        patches on a side of the picture that the position embedding was made for
    features    width of the fusion
    """

    stem: int = 64
    stages: tuple[int, ...] = (3, 4, 9)
    channels: tuple[int, ...] = (256, 512, 1024)
    bottleneck: tuple[int, ...] = (64, 128, 256)
    width: int = 768
    layers: int = 12
    heads: int = 12
    hooks: tuple[int, ...] = (8, 11)
    grid: int = 24
    features: int = 256

    def __post_init__(self) -> None:
        if not len(self.stages) == len(self.channels) == len(self.bottleneck) == 3:
            raise ValueError("a depth network has three ResNet stages")
        if len(self.hooks) != 2 or self.hooks[1] >= self.layers:
            raise ValueError(f"hooks {self.hooks} do not fit {self.layers} transformer blocks")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. An unknown name is a TypeError."""
        return cls(**unplain(data))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return plain(self)


# -- the ResNet --------------------------------------------------------------------------------


class StdConv2d(nn.Conv2d):
    """Without a bias; each filter is brought to mean 0 and variance 1 (biased, eps 1e-8)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        wide = cast(weight, torch.float32) if weight.dtype in HALF else weight
        standard = F.layer_norm(wide, wide.shape[1:], eps=1e-8).reshape(self.weight.shape)
        padded = same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(padded, cast(standard, x.dtype), stride=self.stride)


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around x as TensorFlow's rule "same" has them, for sides that the stride divides.

    The rule puts the odd one right and below: symmetric padding shifts the picture.
    """
    total = kernel - stride
    if total <= 0:
        return x
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-5)


class Projection(nn.Module):
    """What the residual path needs where width or size change."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv2d(c_in, c_out, 1, stride)
        self.norm = _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class Bottleneck(nn.Module):
    """[B, c_in, H, W] -> [B, c_out, H / stride, W / stride]; norms after the convolutions"""

    def __init__(self, c_in: int, inside: int, c_out: int, stride: int, first: bool) -> None:
        super().__init__()
        self.downsample = Projection(c_in, c_out, stride) if first else None
        self.conv1 = StdConv2d(c_in, inside, 1)
        self.norm1 = _norm(inside)
        self.conv2 = StdConv2d(inside, inside, 3, stride)
        self.norm2 = _norm(inside)
        self.conv3 = StdConv2d(inside, c_out, 1)
        self.norm3 = _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        h = self.norm3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Stem(nn.Module):
    """[B, 3, H, W] -> [B, stem, H / 4, W / 4]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = StdConv2d(3, channels, 7, 2)
        self.norm = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        # Padded with zeros, which never win: nothing is below zero here.
        return F.max_pool2d(same(h, 3, 2), 3, 2)


class Blocks(nn.Module):
    def __init__(self, blocks: list[Bottleneck]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResNet(nn.Module):
    """[B, 3, H, W] -> the results of the stages, at 1/4, 1/8 and 1/16"""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.stem = Stem(config.stem)
        self.stages = nn.ModuleList()
        c = config.stem
        for i, count in enumerate(config.stages):
            inside, width = config.bottleneck[i], config.channels[i]
            blocks = []
            for k in range(count):
                blocks.append(Bottleneck(c, inside, width, 2 if i and k == 0 else 1, k == 0))
                c = width
            self.stages.append(Blocks(blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return taps


# -- the transformer ---------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.proj(attention(q, k, v, self.heads))
        return out


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.backbone = ResNet(config)
        self.proj = nn.Conv2d(config.channels[-1], config.width, 1)


class Backbone(nn.Module):
    """image [B, 3, H, W] -> two maps of the ResNet; tokens of two transformer blocks, [B, 1 + hw,
    C]; and the map of patches [B, C, h, w], whose size the tokens have."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.grid, self.hooks = config.grid, config.hooks
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.patch_embed = PatchEmbed(config)
        # What follows the last tap is never run.
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads) for _ in range(config.hooks[-1] + 1)
        )

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        first, second, third = self.patch_embed.backbone(image)
        patches = self.patch_embed.proj(third)  # [B, C, h, w]
        tokens = patches.flatten(2).transpose(1, 2) + self._positions(patches)
        start = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([start.expand(patches.shape[0], -1, -1), tokens], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.hooks:
                taps.append(x)
        return [first, second], taps, patches

    def _positions(self, patches: Tensor) -> Tensor:
        """The position embedding, brought from its own grid to that of the patches: [1, hw, C]."""
        side, width = self.grid, self.pos_embed.shape[2]
        grid = self.pos_embed[:, 1:].transpose(1, 2).reshape(1, width, side, side)
        size = patches.shape[2:]
        wide = cast(grid, torch.float32) if grid.dtype in HALF else grid
        resized = F.interpolate(wide, size=size, mode="bilinear")
        return cast(resized, grid.dtype).flatten(2).transpose(1, 2)


# -- the head ----------------------------------------------------------------------------------


def twice(x: Tensor) -> Tensor:
    """Bilinear, twice the size, corners kept where they are."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


class Readout(nn.Module):
    """Adds to each token what the class token knows: [B, 1 + hw, C] -> [B, hw, C]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # Linear(concat(token, class)) as the sum of its two halves: the class token's is computed
        # once a picture instead of once a token.
        linear = self.project[0]
        assert isinstance(linear, nn.Linear), "as it was built"
        token, first = linear.weight.chunk(2, dim=1)
        return F.gelu(F.linear(x[:, 1:], token) + F.linear(x[:, :1], first, linear.bias))


class Reassemble(nn.ModuleList):
    """Tokens back to a map, [B, 1 + hw, C] -> [B, c_out, h, w]; the coarsest one is halved once
    more. The places 1 and 2 are the original's transposition and unflattening."""

    def __init__(self, width: int, halved: bool) -> None:
        super().__init__([Readout(width), nn.Identity(), nn.Identity(), nn.Conv2d(width, width, 1)])
        if halved:
            self.append(nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """like: [B, C, h, w], the size to take"""
        x = self[0](x).transpose(1, 2).reshape(like.shape)
        for layer in list(self)[3:]:
            x = layer(x)
        return x


class Pretrained(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.model = Backbone(config)
        self.act_postprocess3 = Reassemble(config.width, halved=False)
        self.act_postprocess4 = Reassemble(config.width, halved=True)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps, taps, patches = self.model(image)
        third = self.act_postprocess3(taps[0], patches)
        return [*maps, third, self.act_postprocess4(taps[1], patches)]


class ResidualUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return out


class Fusion(nn.Module):
    """A map, and what came up from the coarser one -> [B, C, 2h, 2w]"""

    def __init__(self, width: int, coarsest: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = None if coarsest else ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, x: Tensor, below: Tensor | None = None) -> Tensor:
        if self.resConfUnit1 is not None:
            assert below is not None, "only the coarsest fusion has nothing below"
            x = below + self.resConfUnit1(x)
        out: Tensor = self.out_conv(twice(self.resConfUnit2(x)))
        return out


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


class Scratch(nn.Module):
    """The four maps -> [B, 1, H, W]"""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        taps = (*config.channels[:2], config.width, config.width)
        for i, c in enumerate(taps, start=1):
            layer = nn.Conv2d(c, config.features, 3, padding=1, bias=False)
            self.add_module(f"layer{i}_rn", layer)
            self.add_module(f"refinenet{i}", Fusion(config.features, coarsest=i == len(taps)))
        self.output_conv = nn.Sequential(
            nn.Conv2d(config.features, config.features // 2, 3, padding=1),
            Twice(),
            nn.Conv2d(config.features // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = None
        for i in range(len(maps), 0, -1):
            layer, fusion = self.get_submodule(f"layer{i}_rn"), self.get_submodule(f"refinenet{i}")
            x = fusion(layer(maps[i - 1]), x)
        out: Tensor = self.output_conv(x)
        return out


class DepthNetwork(nn.Module):
    """Picture -> relative inverse depth.

    image       [B, 3, H, W] in [-1, 1], sides multiples of 32
    returns     [B, H, W], 0 and more, larger is nearer; scale and offset mean nothing
    """

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.config = config
        self.pretrained = Pretrained(config)
        self.scratch = Scratch(config)

    def forward(self, image: Tensor) -> Tensor:
        dtype = self.pretrained.model.cls_token.dtype
        depth: Tensor = self.scratch(self.pretrained(cast(image, dtype))).squeeze(1)
        return depth
