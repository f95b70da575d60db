"""The VAE cut at its norms, so that a picture can go through it in tiles and see its whole self.

A group norm needs the whole picture. `inner`, the network's part at the latent's own resolution
with its attention, is small and runs on the whole. What lies outside, at the picture's
resolutions, is cut into bands `outer0`, `outer1`, ...: between two of them lies one norm at most,
whose statistics are known when the band before has been run on all tiles. A band looks no further
than two cells, so that tiles with a rim of two give what the whole gives.

checked by  tests/parity/test_bands.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import cast
from .vae import Level, ResnetBlock, VAEDecoder, VAEEncoder

INNER = "inner"
HALVES = 3  # of statistics: mean to eight bits, the rest of it, variance
Steps = Sequence[nn.Module]


@dataclass(frozen=True)
class Band:
    """One graph of the cut network.

    module      forward takes the tensors of `given` by these names, and returns those of `made`
    given       maps that it takes -> channels; the first is looked at beyond a cell
    made        maps that it gives -> channels; the next norm's statistics are those of the first
    groups      of the norm whose statistics it takes besides; 0: of none
    times       a side of what it gives, over one of what it takes
    """

    name: str
    module: nn.Module
    given: Mapping[str, int]
    made: Mapping[str, int]
    groups: int = 0
    times: Fraction = Fraction(1)


def bands(network: VAEDecoder | VAEEncoder) -> list[Band]:
    """In the order in which they run. `inner` is the decoder's first and the encoder's last."""
    if isinstance(network, VAEDecoder):
        return [_inner_of_decoder(network), *_numbered(_outer_of_decoder(network))]
    return [*_numbered(_outer_of_encoder(network)), _inner_of_encoder(network)]


def normal(norm: nn.GroupNorm, x: Tensor, statistics: Tensor) -> Tensor:
    """The norm of x [B, C, h, w], with statistics from elsewhere, float32 [B, groups, 3].

    The mean comes in two parts: what reads it in half precision rounds the first to itself, and
    the second is small.
    """
    per = x.shape[1] // norm.num_groups
    parts = (s.expand(-1, -1, per).flatten(1) for s in statistics.chunk(HALVES, dim=2))
    high, low, variance = (s.unsqueeze(-1).unsqueeze(-1) for s in parts)  # [B, C, 1, 1]
    scale = norm.weight[:, None, None] / (variance + norm.eps).sqrt()
    return cast((x - high - low) * scale + norm.bias[:, None, None], x.dtype)


def part_of(network: nn.Module, modules: Steps) -> nn.Module:
    """A module that holds these modules of the network under the names that they have there."""
    names = {id(module): name for name, module in network.named_modules()}
    part = nn.Module()
    for module in modules:
        *path, last = names[id(module)].split(".")
        place = part
        for name in path:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, module)
    return part


class Seen(nn.Module):
    """What leads to a norm: run once for its statistics alone."""

    def __init__(self, network: nn.Module, before: Steps) -> None:
        super().__init__()
        self.network = part_of(network, before)
        self._before = tuple(before)

    def forward(self, x: Tensor) -> Tensor:
        return _through(self._before, cast(x, _dtype(self.network)))


class First(nn.Module):
    """x -> h, the first half of a block, and skip, where it is not x itself."""

    def __init__(self, network: nn.Module, before: Steps, block: ResnetBlock) -> None:
        super().__init__()
        self.network = part_of(network, [*before, block])
        self._before, self._block = tuple(before), (block,)

    def forward(self, x: Tensor, statistics: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        (block,) = self._block
        x = _through(self._before, cast(x, _dtype(self.network)))
        h: Tensor = block.conv1(F.silu(normal(block.norm1, x, statistics)))
        if block.nin_shortcut is not None:
            return h, block.nin_shortcut(x)
        return (h, x) if self._before else h


class Second(nn.Module):
    """h and skip -> x, the second half of a block, and what follows it without a norm."""

    def __init__(self, network: nn.Module, block: ResnetBlock, behind: Steps) -> None:
        super().__init__()
        self.network = part_of(network, [block, *behind])
        self._block, self._behind = (block,), tuple(behind)

    def forward(self, h: Tensor, skip: Tensor, statistics: Tensor) -> Tensor:
        (block,) = self._block
        dtype = _dtype(self.network)
        h = block.conv2(F.silu(normal(block.norm2, cast(h, dtype), statistics)))
        return _through(self._behind, cast(skip, dtype) + h)


class Last(nn.Module):
    """x -> picture"""

    def __init__(self, network: nn.Module, norm: nn.GroupNorm, behind: Steps) -> None:
        super().__init__()
        self.network = part_of(network, [norm, *behind])
        self._norm, self._behind = (norm,), tuple(behind)

    def forward(self, x: Tensor, statistics: Tensor) -> Tensor:
        (norm,) = self._norm
        x = normal(norm, cast(x, _dtype(self.network)), statistics)
        return _through(self._behind, F.silu(x))


class InnerDecoder(nn.Module):
    """latent -> x, at the latent's resolution"""

    def __init__(self, network: VAEDecoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor) -> Tensor:
        network = self.network
        z = network.post_quant_conv(cast(latent, network.post_quant_conv.weight.dtype))
        x: Tensor = network.decoder.mid(network.decoder.conv_in(z))
        return _through(_blocks(network.decoder.up[-1]), x)


class InnerEncoder(nn.Module):
    """x, at the latent's resolution -> moments"""

    def __init__(self, network: VAEEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network, encoder = self.network, self.network.encoder
        x = _through(_blocks(encoder.down[-1]), cast(x, network.quant_conv.weight.dtype))
        x = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(x))))
        moments: Tensor = network.quant_conv(x)
        return moments


def _inner_of_decoder(network: VAEDecoder) -> Band:
    width = _blocks(network.decoder.up[-1])[-1].conv2.out_channels
    module = InnerDecoder(network)
    return Band(INNER, module, {"latent": network.config.embed_dim}, {"x": width})


def _inner_of_encoder(network: VAEEncoder) -> Band:
    width = _blocks(network.encoder.down[-1])[0].conv1.in_channels
    made = {"moments": 2 * network.config.embed_dim}
    return Band(INNER, InnerEncoder(network), {"x": width}, made)


def _outer_of_decoder(network: VAEDecoder) -> Iterator[Band]:
    up = network.decoder.up
    for i in reversed(range(len(up) - 1)):
        step = up[i + 1].upsample
        yield from _opening(network, [step], _blocks(up[i])[0], step.conv.in_channels, Fraction(2))
        for block in _blocks(up[i])[1:]:
            yield from _block(network, block)
    norm, conv = network.decoder.norm_out, network.decoder.conv_out
    yield Band(
        "", Last(network, norm, [conv]), {"x": norm.num_channels}, {"image": conv.out_channels},
        norm.num_groups,
    )  # fmt: skip


def _outer_of_encoder(network: VAEEncoder) -> Iterator[Band]:
    encoder = network.encoder
    before, channels = [encoder.conv_in], encoder.conv_in.in_channels
    for level in encoder.down[:-1]:
        for block in (blocks := _blocks(level)):
            behind = [level.downsample] if block is blocks[-1] else []
            if before:
                yield from _opening(network, before, block, channels, Fraction(1), behind)
                before = []
            else:
                yield from _block(network, block, behind)


def _opening(
    network: nn.Module,
    before: Steps,
    block: ResnetBlock,
    channels: int,
    times: Fraction,
    behind: Steps = (),
) -> Iterator[Band]:
    """A block behind a convolution of which no map is kept: it is computed twice."""
    norm = block.norm1
    x, h = {"x": channels}, block.conv1.out_channels
    seen = {"seen": norm.num_channels}
    yield Band("", Seen(network, before), x, seen, times=times)
    first = First(network, before, block)
    yield Band("", first, x, {"h": h, "skip": h}, norm.num_groups, times)
    yield _second(network, block, behind)


def _block(network: nn.Module, block: ResnetBlock, behind: Steps = ()) -> Iterator[Band]:
    norm, h = block.norm1, block.conv1.out_channels
    made = {"h": h} if block.nin_shortcut is None else {"h": h, "skip": h}
    yield Band(
        "", First(network, [], block), {"x": norm.num_channels}, made, norm.num_groups
    )  # fmt: skip
    yield _second(network, block, behind)


def _second(network: nn.Module, block: ResnetBlock, behind: Steps) -> Band:
    width, norm = block.conv2.out_channels, block.norm2
    times = Fraction(1, 2) if behind else Fraction(1)
    module = Second(network, block, behind)
    return Band("", module, {"h": width, "skip": width}, {"x": width}, norm.num_groups, times)


def _numbered(found: Iterator[Band]) -> list[Band]:
    return [
        Band(f"outer{i}", b.module, b.given, b.made, b.groups, b.times) for i, b in enumerate(found)
    ]


def _blocks(level: Level | nn.Module) -> list[ResnetBlock]:
    assert isinstance(level, Level), "levels of a VAE"
    return list(level.block)  # type: ignore[arg-type]


def _through(steps: Steps, x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
