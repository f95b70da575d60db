"""What a run will hold in memory, and whether that is there: told before anything is loaded.

An estimate, made from the weight files and the sizes of the run; docs/numerics.md has the measured
peaks behind each number. `available` is handed in: this module looks at no machine.

checked by  tests/unit/test_footprint.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import memory
from .bundle import Bundle
from .errors import NotEnoughMemory
from .memory import Plan
from .spec import Component, Precision
from .table import Table
from .weights import totals

# Bytes of a number as the engine keeps it, weight or activation.
WIDTH: Mapping[Precision, int] = {"f32": 4, "bf16": 2, "f16": 2, "int8": 2, "fp8": 2}
BASE = 200 * memory.MIB  # interpreter, libraries, vocabulary


@dataclass(frozen=True)
class Loading:
    """How the networks of a pipeline are loaded: in what precision, and all or one at a time."""

    precision: Precision
    low_memory: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes, by component."""

    parts: Mapping[str, int]
    low_memory: bool

    @property
    def total(self) -> int:
        held = self.parts.values()
        return BASE + (max(held) if self.low_memory else sum(held))


def need(
    bundle: Bundle,
    loading: Loading,
    table: Table,
    size: tuple[int, int],
    plan: Plan,
    *,
    batch: int = 1,
    together: bool = True,
) -> Need:
    """What a run of text to picture holds: text encoder, UNet and decoder.

    size        (h, w) of the latent
    plan        its tiles are what the networks see
    batch       pictures in a network call
    together    whether both halves of guidance go through the UNet in one call
    """
    share = WIDTH[loading.precision] / WIDTH["f32"]
    h, w = size
    tile = plan.unet_tile
    cells = (h, w) if tile is None else (min(h, tile), min(w, tile))
    unet = bundle.component("unet")
    # What memory.py counts is for both halves; apart, it is one half at a time.
    active = memory.unet_bytes(bundle, *cells, batch) - memory.unet_bytes(bundle, 0, 0, batch)
    active = int(active * share) if together else int(active * share / 2)
    side = plan.vae_tile
    window = (h, w) if side is None else (min(h, side), min(w, side))
    nothing = memory.vae_bytes(bundle, 0, 0)
    if side is not None and plan.cuts:
        picture = memory.band_bytes(bundle, h, w, side) - nothing
    else:
        picture = memory.vae_bytes(bundle, *window) - nothing
    copies = _copies(unet, table, together)
    parts = {
        "text_encoder": weight_bytes(bundle.component("text_encoder"), loading.precision),
        "unet": int(weight_bytes(unet, loading.precision) * copies) + active,
        "vae_decoder": weight_bytes(bundle.component("vae_decoder"), loading.precision)
        + int(picture * share),
    }
    return Need(parts, loading.low_memory)


def check(bundle: Bundle, asked: Need, loading: Loading, available: int | None) -> None:
    """Raises NotEnoughMemory when the run needs more than there is."""
    if available is None or asked.total <= available:
        return
    ways = []
    one = replace(asked, low_memory=True)
    if not asked.low_memory and one.total <= available:
        ways.append(f"--low-memory (about {_gigabytes(one.total)})")
    ways.append("a smaller --width and --height")
    if loading.precision != "int8":
        ways.append(f"--precision int8 (made by: sdengine export {bundle.path} --precision int8)")
    raise NotEnoughMemory(
        f"this run needs about {_gigabytes(asked.total)} of memory in {loading.precision}"
        f" ({', '.join(f'{k} {_gigabytes(v)}' for k, v in asked.parts.items())});"
        f" {_gigabytes(available)} are available",
        hint=f"try {', or '.join(ways)}; or close other programs, or raise the container's limit",
    )


def weight_bytes(component: Component, precision: Precision) -> int:
    """Of the weights as an engine packs them; an int8 network has a file of its own."""
    if precision in component.quantised:
        own = component.quantised[precision]
        return totals(own.weights, own.weights_sha256).nbytes
    count = totals(component.weights, component.weights_sha256).values
    width = WIDTH["f32"] if precision == "int8" else WIDTH[precision]
    return count * width


def _copies(unet: Component, table: Table, together: bool) -> float:
    """Every compiled shape and graph of a network has its own weights; a shallow graph has few."""
    full = unet.graphs["full"].macs
    compiled = {(row.guidance != 1.0 and together, row.graph) for row in table.rows()}
    shares = []
    for _, name in compiled:
        macs = unet.graphs[name].macs
        shares.append(macs / full if name.startswith("shallow") and macs and full else 1.0)
    return sum(shares)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"
