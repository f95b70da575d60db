"""A bundle, a run and a picture in plain data, for JSON, and in lines, for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from . import watermark
from .bundle import Bundle, ParityRecord
from .images import Pixels
from .inputs import open_picture
from .metadata import read_metadata
from .request import Timings
from .spec import Component, is_band
from .weights import read_header


def size(nbytes: int) -> str:
    """In decimal units, as disks are sold: 1.73 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{nbytes} B"


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that `inspect` shows; plain JSON types."""
    return {
        "path": str(bundle.path),
        "id": bundle.id,
        "bytes": sum(r.size for r in bundle.files.values()),
        "producer": dict(bundle.producer),
        "model": asdict(bundle.facts),
        "components": {n: _component(bundle, c) for n, c in bundle.components.items()},
        "targets": {
            n: {"precisions": list(t.precisions), "files": [_file(bundle, f) for f in t.files]}
            for n, t in bundle.targets.items()
        },
        "parity": [asdict(r) for r in bundle.parity],
    }


def _component(bundle: Bundle, component: Component) -> dict[str, Any]:
    tensors = read_header(component.weights)
    parameters: dict[str, int] = {}
    for stored in tensors.values():
        count = 1
        for side in stored.shape:
            count *= side
        parameters[stored.dtype] = parameters.get(stored.dtype, 0) + count
    return {
        "inputs": [str(t) for t in component.spec.inputs],
        "outputs": [str(t) for t in component.spec.outputs],
        "graphs": {n: _file(bundle, g.path) for n, g in component.graphs.items()},
        "weights": {
            **_file(bundle, component.weights),
            "tensors": len(tensors),
            "parameters": parameters,
        },
        "config": _plain(component.config),
    }


def _file(bundle: Bundle, path: Path) -> dict[str, Any]:
    name = path.relative_to(bundle.path).as_posix()
    record = bundle.files[name]
    return {"file": name, "bytes": record.size, "sha256": record.sha256}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def bundle_lines(bundle: Bundle, *, verified: bool) -> Iterator[str]:
    facts, found = bundle.facts, bundle_facts(bundle)
    height, width = facts.native_size
    source, latent, schedule = facts.source, facts.latent, facts.schedule
    yield f"{facts.name}: {facts.variant}, {facts.prediction}-prediction, {width} x {height} pixels"
    yield from table(
        [
            ("id", bundle.id),
            ("folder", str(bundle.path)),
            ("on disk", size(found["bytes"])),
            ("licence", facts.licence),
            ("source", f"{source.file} ({source.kind}, {source.weights} weights)"),
            ("", f"sha256 {source.sha256}"),
            (
                "schedule",
                f"{schedule.kind}, beta {schedule.beta_start:g} to {schedule.beta_end:g}, "
                f"{schedule.timesteps} timesteps",
            ),
            (
                "latent",
                f"{latent.channels} channels, scale {latent.scale:g}, {latent.factor} pixels a "
                f"cell, sides in multiples of {latent.multiple}",
            ),
            ("text", f"{facts.tokenizer.length} tokens, padded with {facts.tokenizer.pad}"),
            ("made by", ", ".join(f"{k} {v}" for k, v in bundle.producer.items())),
            ("hashes", "all computed again, all right" if verified else "as remembered"),
        ]
    )
    for name, part in found["components"].items():
        yield ""
        yield from _component_lines(name, part, [r for r in bundle.parity if r.component == name])
    yield ""
    yield "targets" if bundle.targets else "targets: none"
    yield from table(
        (name, f"{', '.join(t['precisions'])}; {_files(t['files'])}")
        for name, t in found["targets"].items()
    )


def _component_lines(
    name: str, part: Mapping[str, Any], parity: Iterable[ParityRecord]
) -> Iterator[str]:
    weights = part["weights"]
    amounts = ", ".join(f"{n / 1e6:.4g} M in {t}" for t, n in weights["parameters"].items())
    yield f"{name}: {amounts}"
    yield from table(
        [
            *(("in", t) for t in part["inputs"]),
            *(("out", t) for t in part["outputs"]),
            ("weights", f"{size(weights['bytes'])}, sha256 {weights['sha256'][:16]}"),
            *(
                (n, f"{size(g['bytes'])}, sha256 {g['sha256'][:16]}")
                for n, g in part["graphs"].items()
                if not is_band(n)
            ),
            *_bands_line(part["graphs"]),
            *(("parity", _parity(r)) for r in _worst_bands(parity)),
        ]
    )


def _bands_line(graphs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All pieces of a network that was cut at its norms, in one line."""
    found = [g for n, g in graphs.items() if is_band(n)]
    if found:
        yield "bands", f"{len(found)} graphs, {size(sum(g['bytes'] for g in found))}, for tiles"


def _worst_bands(records: Iterable[ParityRecord]) -> list[ParityRecord]:
    """The records; of a network's pieces the worst alone, on each runtime in each precision."""
    records = list(records)
    worst: dict[tuple[str, str, str], ParityRecord] = {}
    for r in records:
        key = (r.component, r.runtime, r.precision)
        if is_band(r.graph) and (key not in worst or _db(r) < _db(worst[key])):
            worst[key] = r
    return [r for r in records if not is_band(r.graph)] + list(worst.values())


def _db(record: ParityRecord) -> float:
    return math.inf if record.psnr_db is None else record.psnr_db


def _parity(r: ParityRecord) -> str:
    near = "equal" if r.psnr_db is None else f"{r.psnr_db:.1f} dB"
    return (
        f"{r.graph} on {r.runtime} {r.precision}, {r.output}: max abs {r.max_abs:.2g}, {near} "
        f"({r.case}; gate {r.gate})"
    )


def _files(files: list[Mapping[str, Any]]) -> str:
    if not files:
        return "no files of its own"
    return f"{len(files)} files, {size(sum(f['bytes'] for f in files))}"


def picture_facts(path: Path) -> dict[str, Any]:
    """What a picture file says of its making, in plain JSON types.

    `mark` is the invisible one: the 32 bits that are read, how many of them are the mark's own, and
    its text where so many agree that chance does not explain it; None where the picture is too
    small to hold one. `parameters` is "" and `request` None when the file does not say.

    raises   StorageError, RequestError when the file is not a picture that can be read
    """
    said = read_metadata(path)
    pixels = np.asarray(open_picture(path))
    return {
        "path": str(path),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "mark": _mark(pixels),
        "parameters": said.parameters,
        "request": None if said.request is None else dict(said.request),
        "about": dict(said.about),
    }


def _mark(pixels: Pixels) -> dict[str, Any] | None:
    if not watermark.fits(*pixels.shape[:2]):
        return None
    bits, text = watermark.decode(pixels)
    return {
        "text": text,
        "bits": "".join(map(str, bits)),
        "agreeing": watermark.agreeing(bits),
        "of": len(bits),
    }


def picture_lines(path: Path) -> Iterator[str]:
    """Size, mark, seed and model; then the text that other tools read, and the whole request."""
    found = picture_facts(path)
    about, request = found["about"], found["request"]
    yield f"{path.name}: {found['width']} x {found['height']} pixels"
    yield from table(
        [
            ("mark", _mark_text(found["mark"])),
            *([] if request is None else [("seed", str(request.get("seed")))]),
            *((name, about[name]) for name in about),
        ]
    )
    yield ""
    said = found["parameters"]
    yield said if said else "this picture does not say how it was made"
    if request is not None:
        yield json.dumps({"request": request}, indent=2, ensure_ascii=False)


def _mark_text(mark: Mapping[str, Any] | None) -> str:
    if mark is None:
        return "none: the picture is too small to hold one"
    agreement = f"{mark['agreeing']} of {mark['of']} bits are those of {watermark.TEXT}"
    return f"{'none found' if mark['text'] is None else mark['text']} ({agreement})"


def table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Two columns, indented by two."""
    kept = list(rows)
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        yield f"  {name:<{width}}  {value}".rstrip()


def preset_lines(measured: Mapping[str, Any]) -> Iterator[str]:
    """The presets of a measured model: cost, and distance from `reference`."""
    yield ""
    yield f"presets, against {measured['against']}, {measured['prompts']} prompts"
    yield from table(
        (
            row["preset"],
            f"{row['cost']:.3g} whole network calls; PSNR {row['psnr_median']:.1f} dB, worst"
            f" {row['psnr_worst']:.1f}; SSIM {row['ssim_median']:.3f};"
            f" GMSD {row['gmsd_median']:.3f}",
        )
        for row in measured["rows"]
    )


def cost_line(preset: str | None, cost: float, calls: int) -> str:
    """`preset balanced: 12 network calls, as much as 7.3 whole ones for each picture`"""
    who = "no preset" if preset is None else f"preset {preset}"
    return f"{who}: {calls} network calls, as much as {cost:.3g} whole ones for each picture"


def timing_line(timings: Timings, about: Mapping[str, str]) -> str:
    """`load 1.9 s   text 11 ms   denoise 25 x 14.2 ms   decode 38 ms   total 2.3 s   torch f32`"""
    row = fmean(timings.rows) if timings.rows else 0.0
    return "   ".join(
        [
            f"load {_seconds(timings.load)}",
            f"text {_seconds(timings.text)}",
            f"denoise {len(timings.rows)} x {_seconds(row)}",
            f"decode {_seconds(timings.decode)}",
            f"total {_seconds(timings.total)}",
            " ".join(about[key] for key in ("backend", "precision") if key in about),
        ]
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"
