"""Measures the named presets on an embedded model, and writes what `sdengine inspect` shows.

    python -m sdengine.bench.presets_quality --out models/emoji.presets.json

Each preset's pictures are compared with those of `reference` (float32, same seed and prompt), and
with those of 50 float32 steps; for the same cost in whole network calls, so are pictures of plain
fewer steps of the same kind of run, which a preset must beat. Where the bundle has no int8 network,
what runs in it is left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import api
from ..engine.bundle import open_bundle
from ..engine.ports import Array
from ..engine.presets import PRESETS, Preset, cost, costs_of
from ..engine.spec import Precision
from . import env, quality
from .presets_search import MOST, SUBJECTS, Drawer, prompts_of

SHIPPED = ("exact", "high", "balanced", "fast")
FINE = Preset("f32", 50, "dpmpp_2m")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args(arguments)
    bundle = open_bundle(api.find_model(args.model))
    costs = costs_of(bundle.components["unet"])
    prompts = prompts_of(SUBJECTS, args.prompts)
    precisions: list[Precision] = ["f32", "bf16", *bundle.components["unet"].quantised]
    drawers = {p: Drawer(bundle, args.backend, p, None, args.guidance) for p in precisions}

    @cache
    def pictures(preset: Preset) -> list[Array]:
        drawer = drawers[preset.precision]
        return [drawer.draw(preset, text, args.seed + k) for k, text in enumerate(prompts)]

    reference, fine = pictures(PRESETS["reference"]), pictures(FINE)
    rows = []
    for name, preset in _shipped():
        if preset.precision not in drawers:
            sys.stderr.write(f"{name}: {bundle.path.name} has no {preset.precision} network\n")
            continue
        made = pictures(preset)
        price = cost(drawers["bf16"].table(preset), costs)
        # the better of two plain runs of as many whole steps: the preset's own levels, the default
        own = replace(preset, steps=max(1, round(price)), cache=1, interval=None)
        plain = [own, replace(PRESETS["exact"], steps=own.steps)]
        rows.append(
            {
                "preset": name,
                "cost": round(price, 3),
                **_summary(made, reference),
                "to_50_steps_median": _median(made, fine),
                "plain_steps": own.steps,
                "plain_to_50_steps_median": max(_median(pictures(p), fine) for p in plain),
            }
        )
        sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    content = {
        "command": "python -m sdengine.bench.presets_quality "
        + " ".join(f"--{k} {v.name if k == 'out' else v}" for k, v in vars(args).items()),
        "against": "reference: float32, 25 steps of dpmpp_2m, same seeds",
        "prompts": len(prompts),
        "guidance": args.guidance,
        "bundle": bundle.id,
        "conditions": env.conditions(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _shipped() -> Iterator[tuple[str, Preset]]:
    """Each as it runs without int8, and behind it as it runs where the bundle has that."""
    for name in SHIPPED:
        preset = PRESETS[name]
        yield name, preset
        if preset.or_int8:
            yield f"{name} in int8", replace(preset, precision="int8")


def _summary(made: Sequence[Array], wanted: Sequence[Array]) -> dict[str, Any]:
    found = [quality.compare(a, b) for a, b in zip(made, wanted, strict=True)]
    psnr = [MOST if q.psnr_db is None else q.psnr_db for q in found]
    return {
        "psnr_median": round(float(np.median(psnr)), 2),
        "psnr_worst": round(min(psnr), 2),
        "ssim_median": round(float(np.median([q.ssim for q in found])), 4),
        "ssim_worst": round(min(q.ssim for q in found), 4),
        "gmsd_median": round(float(np.median([q.gmsd for q in found])), 4),
        "gmsd_worst": round(max(q.gmsd for q in found), 4),
    }


def _median(made: Sequence[Array], wanted: Sequence[Array]) -> float:
    found = [min(MOST, quality.psnr(a, b)) for a, b in zip(made, wanted, strict=True)]
    return round(float(np.median(found)), 2)


if __name__ == "__main__":
    sys.exit(main())
