"""The VAE: picture -> moments of the latent, latent -> picture. Written to be traced.

Names are those of the original checkpoint under `PREFIX`. The sample is taken outside
(mean + std * noise), so that the noise stays the caller's choice.

source      Rombach et al. 2022, arXiv:2112.10752
checked by  tests/golden/test_networks.py (vae_f8, vae_f4), tests/golden/test_key_lists.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention, cast, plain, unplain, upsample2

PREFIX = "first_stage_model."


@dataclass(frozen=True)
class VAEConfig:
    """Widths of a VAE. The picture is 2 ** (len(ch_mult) - 1) times the latent: f8, f4."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    embed_dim: int = 4
    in_channels: int = 3
    out_ch: int = 3

    @classmethod
    def from_ldm(cls, vae: Mapping[str, Any]) -> Self:
        """From the `ddconfig` (with `embed_dim`) of an LDM model file."""
        if vae.get("attn_resolutions") or not vae.get("double_z", True):
            raise ValueError(f"not a Stable Diffusion 2 VAE: {dict(vae)}")
        return cls.from_dict({k: vae[k] for k in cls.__dataclass_fields__ if k in vae})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. An unknown name is a TypeError."""
        return cls(**unplain(data))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return plain(self)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """[B, c_in, h, w] -> [B, c_out, h, w]"""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        return out


class AttnBlock(nn.Module):
    """One head over all channels: [B, C, h, w] -> same. The scores are (h * w) ** 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, hw, C]
        h = attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros on the right and at the bottom only; the UNet pads all four sides.
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(upsample2(x))
        return out


class Mid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, then the step to the next one, if there is a next."""

    def __init__(self, c_in: int, c_out: int, blocks: int, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks)
        )
        for name, module in resample.items():  # `downsample` or `upsample`, as in the checkpoint
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        for name, layer in self.named_children():
            if name != "block":
                x = layer(x)
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, 2 * z_channels, h, w], before `quant_conv`"""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.ch
        for i, width in enumerate(widths):
            step = {"downsample": Downsample(width)} if i < len(widths) - 1 else {}
            self.down.append(Level(c, width, config.num_res_blocks, **step))
            c = width
        self.mid = Mid(c)
        self.norm_out = _norm(c)
        self.conv_out = nn.Conv2d(c, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return x


class Decoder(nn.Module):
    """[B, z_channels, h, w], after `post_quant_conv` -> [B, 3, H, W]"""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, c, 3, padding=1)
        self.mid = Mid(c)
        levels: list[Level] = []
        for i, width in reversed(list(enumerate(widths))):
            step = {"upsample": Upsample(width)} if i > 0 else {}
            levels.append(Level(c, width, config.num_res_blocks + 1, **step))
            c = width
        self.up = nn.ModuleList(reversed(levels))  # stored shallow first, run deep first
        self.norm_out = _norm(c)
        self.conv_out = nn.Conv2d(c, config.out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return x


class VAEEncoder(nn.Module):
    """Picture -> moments.

    image       [B, 3, H, W] in [-1, 1], sides multiples of the down factor
    returns     [B, 2 * embed_dim, h, w]: mean, then log-variance, not clamped
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(cast(image, self.quant_conv.weight.dtype)))
        return moments


class VAEDecoder(nn.Module):
    """Latent -> picture.

    latent      [B, embed_dim, h, w], already divided by the latent scale
    returns     [B, 3, H, W], nominally in [-1, 1], not clamped
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, latent: Tensor) -> Tensor:
        z = self.post_quant_conv(cast(latent, self.post_quant_conv.weight.dtype))
        image: Tensor = self.decoder(z)
        return image
