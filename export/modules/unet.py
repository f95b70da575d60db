"""The UNet of Stable Diffusion 2, every variant, written to be traced.

Names are those of the original checkpoint under `PREFIX`.

source      Rombach et al. 2022, arXiv:2112.10752; Ronneberger et al. 2015, arXiv:1505.04597
checked by  tests/golden/test_networks.py (unet_*), tests/golden/test_key_lists.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Table, attention, cast, plain, unplain, upsample2

PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class UNetConfig:
    """Widths and switches of a UNet.

    attention_ds   the down factors, relative to the latent, whose levels hold transformers
    head_channels  width of a head; or num_heads, heads a layer; exactly one of the two is set
    num_classes    None, a number of int64 labels (x4), or "sequential": a float vector (unCLIP)
    cross_only     per level: the first attention looks at the text too; () means nowhere
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_ds: tuple[int, ...] = (1, 2, 4)
    head_channels: int | None = 64
    num_heads: int | None = None
    context_dim: int = 1024
    num_classes: int | Literal["sequential"] | None = None
    adm_in_channels: int | None = None
    cross_only: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if (self.head_channels is None) == (self.num_heads is None):
            raise ValueError("exactly one of head_channels and num_heads must be set")
        if (self.num_classes == "sequential") != (self.adm_in_channels is not None):
            raise ValueError("adm_in_channels goes with num_classes = 'sequential', and only then")
        if self.cross_only and len(self.cross_only) != len(self.channel_mult):
            raise ValueError(f"cross_only needs {len(self.channel_mult)} entries or none")

    @classmethod
    def from_ldm(cls, unet: Mapping[str, Any]) -> Self:
        """From the `unet_config` parameters of an LDM model file."""
        required = {"use_spatial_transformer": True, "use_linear_in_transformer": True}
        forbidden = {
            "transformer_depth": 1,
            "disable_middle_self_attn": False,
            "use_scale_shift_norm": False,
            "resblock_updown": False,
            "conv_resample": True,
            "dims": 2,
        }
        for name, want in (required | forbidden).items():
            if (found := unet.get(name, forbidden.get(name))) != want:
                raise ValueError(
                    f"not a Stable Diffusion 2 UNet: {name} is {found!r}, expected {want!r}"
                )
        # -1 is LDM's own "not set"
        head_channels = unet.get("num_head_channels", -1)
        num_heads = unet.get("num_heads", -1)
        return cls(
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
            model_channels=unet["model_channels"],
            channel_mult=tuple(unet["channel_mult"]),
            num_res_blocks=unet["num_res_blocks"],
            attention_ds=tuple(sorted(unet["attention_resolutions"])),
            head_channels=None if head_channels == -1 else head_channels,
            num_heads=num_heads if head_channels == -1 else None,
            context_dim=unet["context_dim"],
            num_classes=unet.get("num_classes"),
            adm_in_channels=unet.get("adm_in_channels"),
            cross_only=tuple(unet.get("disable_self_attentions") or ()),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. An unknown name is a TypeError."""
        return cls(**unplain(data))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a manifest."""
        return plain(self)

    def heads(self, channels: int) -> int:
        """Heads of an attention layer of this width."""
        if self.head_channels is not None:
            return channels // self.head_channels
        assert self.num_heads is not None, "see __post_init__"
        return self.num_heads


class ResBlock(nn.Module):
    """x [B, c_in, h, w], emb [B, 4 * model_channels] -> [B, c_out, h, w]"""

    def __init__(self, c_in: int, c_out: int, emb_dim: int) -> None:
        super().__init__()
        # The Identity keeps the place of a dropout: the checkpoint calls the convolution 3.
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class CrossAttention(nn.Module):
    """x [B, T, C] attends to context [B, S, context_dim] -> [B, T, C]"""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.to_out(
            attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        )
        return out


class GEGLU(nn.Module):
    """value * gelu(gate), exact erf form. Shazeer 2020, arXiv:2002.05202"""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(channels, context_dim if cross_only else channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, context if self.cross_only else n)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """x [B, C, h, w], context [B, T, context_dim] -> [B, C, h, w]"""

    def __init__(self, channels: int, context_dim: int, heads: int, cross_only: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)  # the other norms of the UNet have 1e-5
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, heads, cross_only)]
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, hw, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        out: Tensor = x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(upsample2(x))
        return out


class Stage(nn.ModuleList):
    """Layers in a row, each given what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """One network pass.

    sample                 [B, in_channels, h, w]: latent, then mask, masked latent, depth or
                           low-resolution picture; h, w multiples of the deepest down factor
    timestep               [B], may be fractional
    encoder_hidden_states  [B, T, context_dim]
    class_labels           int64 [B] (x4), float [B, adm_in_channels] (unCLIP), else None
    returns                [B, out_channels, h, w]: epsilon or v, in the dtype of the weights
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c0, emb_dim = config.model_channels, 4 * config.model_channels
        self.frequencies = Table(partial(_frequencies, c0 // 2))
        self.time_embed = nn.Sequential(
            nn.Linear(c0, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        if config.num_classes == "sequential":
            assert config.adm_in_channels is not None, "see UNetConfig.__post_init__"
            self.label_emb: nn.Module | None = nn.Sequential(
                nn.Sequential(
                    nn.Linear(config.adm_in_channels, emb_dim),
                    nn.SiLU(),
                    nn.Linear(emb_dim, emb_dim),
                )
            )
        elif config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_dim)
        else:
            self.label_emb = None

        def transformer(channels: int, cross_only: bool) -> SpatialTransformer:
            return SpatialTransformer(
                channels, config.context_dim, config.heads(channels), cross_only
            )

        levels = len(config.channel_mult)
        widths = [c0 * m for m in config.channel_mult]
        cross_only = config.cross_only or (False,) * levels
        attends = [2**level in config.attention_ds for level in range(levels)]

        self.input_blocks = nn.ModuleList(
            [Stage([nn.Conv2d(config.in_channels, c0, 3, padding=1)])]
        )
        c, skips = c0, [c0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                stage = Stage([ResBlock(c, width, emb_dim)])
                c = width
                if attends[level]:
                    stage.append(transformer(c, cross_only[level]))
                self.input_blocks.append(stage)
                skips.append(c)
            if level < levels - 1:
                self.input_blocks.append(Stage([Downsample(c)]))
                skips.append(c)

        # The middle keeps its self-attention in every variant.
        self.middle_block = Stage(
            [ResBlock(c, c, emb_dim), transformer(c, False), ResBlock(c, c, emb_dim)]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                stage = Stage([ResBlock(c + skips.pop(), width, emb_dim)])
                c = width
                if attends[level]:
                    stage.append(transformer(c, cross_only[level]))
                if level > 0 and i == config.num_res_blocks:
                    stage.append(Upsample(c))
                self.output_blocks.append(stage)

        self.out = nn.Sequential(
            nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, config.out_channels, 3, padding=1)
        )

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.get_parameter("out.2.weight").dtype

    def embed(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Time (and class) embedding, [B, 4 * model_channels], in the dtype of the weights."""
        dtype = self.dtype
        # float32 whatever the weights are: half precision cannot tell t = 999 from t = 998.5.
        angles = cast(timestep, torch.float32)[..., None] * self.frequencies()
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        emb: Tensor = self.time_embed(cast(sinusoid, dtype))
        if (self.label_emb is None) != (class_labels is None):
            raise ValueError(
                f"class_labels: {'missing' if class_labels is None else 'not taken'}, "
                f"num_classes is {self.config.num_classes!r}"
            )
        if self.label_emb is not None and class_labels is not None:
            if class_labels.is_floating_point():
                class_labels = cast(class_labels, dtype)
            emb = emb + self.label_emb(class_labels)
        return emb

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        emb, context, x = self._begin(sample, timestep, encoder_hidden_states, class_labels)
        skips = self._down(x, emb, context, len(self.input_blocks))
        return self._up(self.middle_block(skips[-1], emb, context), skips, emb, context)

    def deep(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        cuts: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What `forward` returns, and for each cut k what `shallow` needs: the features that meet
        skip k, [B, C, h, w] at the latent's own resolution (k at most num_res_blocks).

        source      Ma et al. 2023, DeepCache, arXiv:2312.00858, section 3.2
        """
        features: dict[int, Tensor] = {}
        emb, context, x = self._begin(sample, timestep, encoder_hidden_states, class_labels)
        skips = self._down(x, emb, context, len(self.input_blocks))
        x = self.middle_block(skips[-1], emb, context)
        out = self._up(x, skips, emb, context, features)
        return out, {cut: features[cut] for cut in cuts}

    def shallow(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        features: Tensor,
        cut: int,
    ) -> Tensor:
        """As `forward`, with the features of `deep` in the place of all that lies below the cut:
        input blocks 0..cut and the last cut + 1 output blocks run."""
        emb, context, x = self._begin(sample, timestep, encoder_hidden_states, class_labels)
        skips = self._down(x, emb, context, cut + 1)
        return self._up(cast(features, self.dtype), skips, emb, context)

    def _begin(
        self, sample: Tensor, timestep: Tensor, text: Tensor, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding, text and sample, in the dtype of the weights."""
        emb = self.embed(timestep, class_labels)
        return emb, cast(text, self.dtype), cast(sample, self.dtype)

    def _down(self, x: Tensor, emb: Tensor, context: Tensor, count: int) -> list[Tensor]:
        """The results of the first input blocks."""
        skips = []
        for stage in list(self.input_blocks)[:count]:
            x = stage(x, emb, context)
            skips.append(x)
        return skips

    def _up(
        self,
        x: Tensor,
        skips: list[Tensor],
        emb: Tensor,
        context: Tensor,
        features: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The output blocks that these skips belong to; `features` is given what meets skip k."""
        for stage in list(self.output_blocks)[-len(skips) :]:
            if features is not None:
                features[len(skips) - 1] = x
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context)
        out: Tensor = self.out(x)
        return out


def _frequencies(half: int) -> Tensor:
    """exp(-ln(10000) i / half), i = 0..half-1. float32, op by op as the reference computes it."""
    i = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000.0) * i / half)
