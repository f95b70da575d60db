"""Which tiles a run needs so that it stays within the memory that the machine has.

An estimate, from the widths of the networks: docs/numerics.md has the measured peaks behind each
number. `available` is handed in: this module looks at no machine.

checked by  tests/unit/test_memory.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .bundle import Bundle
from .errors import RequestError
from .spec import Component, bands_of
from .tiles import Grid
from .weights import totals

MIB = 2**20
FLOAT, HALF = 4, 2
# What one call holds at its peak, as measured with OpenVINO in float32 and rounded up: floats for
# each channel that enters and that leaves the widest layer; the UNet keeps its skips beside.
ENTERING, LEAVING, UNET = 2.0, 2.6, 13.0
# Bytes a parameter of a loaded network: in float32, and in the engine's packed form beside it.
LOADED = 8
INNER = 8.0  # floats a channel and cell, of `inner` at the latent's size
SHARE = 0.8  # of the available memory that a plan may use: the rest is for the unforeseen
SMALLEST = 16  # latent cells; below it a VAE's statistics have too little to go by
EXACT = "they share the whole picture's norm statistics, and give what it gives in one piece"
BLENDED = (
    "each is a picture of its own to the VAE's norms: colours may differ from those in one piece"
)


@dataclass(frozen=True)
class Plan:
    """Tile sides in latent cells; None runs the network on the whole at once.

    cuts    component -> its bands, with which VAE tiles give what the whole gives
    """

    vae_tile: int | None
    unet_tile: int | None
    reason: str
    cuts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def plan(
    bundle: Bundle,
    height: int,
    width: int,
    available: int | None,
    asked: int | str | None = None,
    *,
    unet: int | None = None,
    batch: int = 1,
    scores: bool = False,
) -> Plan:
    """The tiles for a picture of height x width pixels (of the result).

    available   bytes free before the networks are loaded; None: not known, nothing is tiled
    asked       "auto" or None: the largest that fits; "off": never; a number: that side, in latent
                cells, for the VAE, and for the UNet of an upscaler
    unet        a side asked for the UNet of any model: tiles of it never come by themselves there
    batch       pictures in one call of the UNet
    scores      whether the engine keeps attention scores in memory, (h w)^2 of them
    raises      RequestError: a side that makes no sense, or too little memory for any
    """
    latent = bundle.facts.latent
    upscaler = bundle.facts.variant == "x4-upscaler"
    h, w = -(-height // latent.factor), -(-width // latent.factor)
    side = _side(asked, latent.multiple, "tile")
    own = _side(unet, latent.multiple, "tile of the UNet")
    unet_asked = own if own is not None else side if upscaler else None
    if asked == "off" or side is not None or available is None or not known(bundle):
        as_asked = asked not in (None, "auto")
        reason = f"tiles as asked: {asked}" if as_asked else "what memory it takes is not known"
        vae, cuts = _cut(side, h, w), _cuts(bundle)
        reason = reason if vae is None else f"{reason}; {EXACT if cuts else BLENDED}"
        return Plan(vae, _cut(unet_asked, h, w), reason, cuts)
    budget = int(available * SHARE)
    vae, cuts = _vae_tile(bundle, h, w, budget, scores)
    if upscaler and own is None:
        unet_asked = _fit(
            lambda a, b: unet_bytes(bundle, a, b, batch, scores),
            h, w, latent.multiple, budget, "UNet",
        )  # fmt: skip
    cut = _cut(unet_asked, h, w)
    reason = _reason(bundle, h, w, vae, cuts, scores, available)
    unets = "" if cut is None else f"; the UNet in tiles of {cut} cells"
    return Plan(vae, cut, reason + unets, cuts)


def known(bundle: Bundle) -> bool:
    """Whether the configs of its networks say how wide they are: what they take is known then."""
    return (
        "ch" in bundle.component("vae_decoder").config
        and "channel_mult" in bundle.component("unet").config
    )


def vae_bytes(bundle: Bundle, height: int, width: int, scores: bool = False) -> int:
    """Of the decoder, or the encoder if that needs more, on height x width latent cells."""
    return max(
        _vae(bundle, name, height, width, scores)
        for name in ("vae_decoder", "vae_encoder")
        if name in bundle.components
    )


def band_bytes(bundle: Bundle, height: int, width: int, tile: int, scores: bool = False) -> int:
    """Of the decoder, or the encoder if that needs more, in bands: height x width latent cells in
    tiles of tile x tile."""
    return max(
        _banded(bundle, name, height, width, tile, scores)
        for name in ("vae_decoder", "vae_encoder")
        if name in bundle.components
    )


def unet_bytes(
    bundle: Bundle, height: int, width: int, batch: int = 1, scores: bool = False
) -> int:
    """Of a guided call, both halves, on height x width latent cells."""
    component = bundle.component("unet")
    config = component.config
    widths = [config["model_channels"] * m for m in config["channel_mult"]]
    # The last blocks join a skip to what comes from below, both at full size.
    channels = widths[0] + max(widths[0], widths[min(1, len(widths) - 1)])
    cells = 2 * batch * height * width
    need = UNET * channels * cells * FLOAT
    if scores:
        for level in config["attention_ds"]:
            tokens = -(-height // level) * -(-width // level)
            heads = _heads(config, widths[level.bit_length() - 1])
            need = max(need, 2 * batch * heads * tokens**2 * FLOAT)
    return int(need) + _loaded(component)


def _vae(bundle: Bundle, name: str, height: int, width: int, scores: bool) -> int:
    component = bundle.component(name)
    need = _outermost(bundle, name, height, width)
    if scores:
        need += (height * width) ** 2 * FLOAT
    return int(need) + _loaded(component)


def _outermost(bundle: Bundle, name: str, height: int, width: int) -> float:
    """Of the level at the picture's own size."""
    config, scale = bundle.component(name).config, bundle.facts.latent.factor
    leaving = config["ch"] * config["ch_mult"][0]
    # The decoder's last level begins with the channels of the level below, already at full size.
    below = max(config["ch_mult"][:2]) if name == "vae_decoder" else config["ch_mult"][0]
    floats = ENTERING * config["ch"] * below + LEAVING * leaving
    return float(floats * height * width * scale**2 * FLOAT)


def _banded(bundle: Bundle, name: str, height: int, width: int, tile: int, scores: bool) -> int:
    """The larger of what `inner` holds, and of the maps between bands with one tile."""
    component = bundle.component(name)
    config, scale = component.config, bundle.facts.latent.factor
    cells, widths = height * width, [config["ch"] * m for m in config["ch_mult"]]
    inner = INNER * widths[-1] * cells * FLOAT
    if scores:
        inner += cells**2 * FLOAT
    # Two maps of the picture's own size, that of the level below beside them, and the picture.
    maps = (2 * widths[0] + widths[min(1, len(widths) - 1)] / 4) * HALF + 3 * FLOAT
    tiled = maps * cells * scale**2 + _outermost(bundle, name, min(tile, height), min(tile, width))
    return int(max(inner, tiled)) + _loaded(component)


def _cuts(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """The VAE's bands; nothing where a part of it has none."""
    found = {
        name: bands_of(component)
        for name, component in bundle.components.items()
        if name.startswith("vae_")
    }
    return found if all(found.values()) else {}


def _vae_tile(
    bundle: Bundle, h: int, w: int, budget: int, scores: bool
) -> tuple[int | None, dict[str, tuple[str, ...]]]:
    """The largest tile that fits, in bands where the bundle and the memory have room for them."""
    multiple = bundle.facts.latent.multiple
    cuts = _cuts(bundle)
    least = -(-SMALLEST // multiple) * multiple
    if cuts and vae_bytes(bundle, h, w, scores) > budget:
        for side in range((max(h, w) - 1) // multiple * multiple, least - 1, -multiple):
            if band_bytes(bundle, h, w, side, scores) <= budget:
                return side, cuts
    tile = _fit(lambda a, b: vae_bytes(bundle, a, b, scores), h, w, multiple, budget, "VAE")
    return tile, {}


def _loaded(component: Component) -> int:
    return LOADED * totals(component.weights, component.weights_sha256).values


def _heads(config: Mapping[str, Any], width: int) -> int:
    heads = config["num_heads"]
    return int(width // config["head_channels"] if heads is None or heads < 1 else heads)


def _fit(
    need: Callable[[int, int], int], h: int, w: int, multiple: int, budget: int, what: str
) -> int | None:
    """The largest tile whose call fits; None where the whole fits. Raises RequestError."""
    if need(h, w) <= budget:
        return None
    least = -(-SMALLEST // multiple) * multiple
    for side in range(max(h, w) // multiple * multiple, least - 1, -multiple):
        if side < max(h, w) and need(min(side, h), min(side, w)) <= budget:
            return side
    smallest = need(min(least, h), min(least, w))
    raise RequestError(
        f"the {what} needs about {_mib(smallest / SHARE)} even in its smallest tiles ({least} x"
        f" {least} latent cells); this machine has {_mib(budget / SHARE)} available",
        hint="close other programs or raise the container's memory limit, or run it all the same"
        f" with --tile {least}",
    )


def _side(asked: int | str | None, multiple: int, what: str) -> int | None:
    """The number in `asked`, checked; None for auto and off."""
    if asked is None or asked in ("auto", "off"):
        return None
    text = str(asked)
    side = int(text) if text.isdecimal() and text.isascii() and asked is not True else 0
    least = -(-SMALLEST // multiple) * multiple
    if side < least or side % multiple:
        raise RequestError(
            f"{what} {asked!r} is no side of a tile: a multiple of {multiple} latent cells from"
            f" {least} on",
            hint=f"give auto, off, or a number such as {4 * least}",
        )
    return side


def _cut(side: int | None, h: int, w: int) -> int | None:
    """A tile that holds the whole is none."""
    return None if side is None or side >= max(h, w) else side


def _reason(
    bundle: Bundle,
    h: int,
    w: int,
    tile: int | None,
    cuts: Mapping[str, tuple[str, ...]],
    scores: bool,
    available: int,
) -> str:
    whole = vae_bytes(bundle, h, w, scores)
    said = f"the VAE needs about {_mib(whole)} for {w}x{h} latent cells at once"
    have = f"{_mib(available)} available"
    if tile is None:
        return f"{said}; {have}: no tiles"
    if cuts:
        need = band_bytes(bundle, h, w, tile, scores)
        return f"{said}; {have}: tiles of {tile} cells, about {_mib(need)} in all; {EXACT}"
    grid = Grid.over(h, w, tile)
    part = vae_bytes(bundle, grid.rows.side, grid.columns.side, scores)
    return f"{said}; {have}: {len(grid)} tiles of {tile} cells, about {_mib(part)} each; {BLENDED}"


def _mib(size: float) -> str:
    return f"{-(-int(size) // MIB)} MiB"
