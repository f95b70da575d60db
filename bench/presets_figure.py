"""Draws what the search of presets found: cost against quality, the front, and the shipped presets.

python -m sdengine.bench.presets_figure bench/results/presets.jsonl --out docs/images/presets.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..engine.presets import PRESETS
from .presets_search import Found, front, read

WIDTH, HEIGHT, EDGE = 640, 400, 48


def svg(found: Sequence[Found]) -> str:
    """One point a setting, those of fewer prompts paler; the line is the front of the others."""
    most = max(len(f.psnr_db) for f in found)
    sure = [f for f in found if len(f.psnr_db) == most]
    top = max(f.cost for f in found) * 1.05
    low, high = min(f.median for f in found) - 1, max(f.median for f in found) + 1

    def place(one: Found) -> tuple[float, float]:
        x = EDGE + one.cost / top * (WIDTH - 2 * EDGE)
        y = HEIGHT - EDGE - (one.median - low) / (high - low) * (HEIGHT - 2 * EDGE)
        return round(x, 1), round(y, 1)

    def parts() -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            ' font-family="sans-serif" font-size="12">'
        )
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        for one in found:
            x, y = place(one)
            colour = "#2b6cb0" if one in sure else "#cbd5e0"
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
        line = " ".join(f"{x},{y}" for x, y in map(place, front(sure)))
        yield f'<polyline points="{line}" fill="none" stroke="#2b6cb0"/>'
        for name, preset in PRESETS.items():
            for one in (f for f in sure if f.preset == preset):
                x, y = place(one)
                yield f'<text x="{x + 6}" y="{y - 6}">{name}</text>'
        for k in range(0, int(top) + 1, 2):
            x = EDGE + k / top * (WIDTH - 2 * EDGE)
            yield f'<text x="{x:.0f}" y="{HEIGHT - EDGE + 18}" text-anchor="middle">{k}</text>'
        for k in range(int(low // 5 + 1) * 5, int(high) + 1, 5):
            y = HEIGHT - EDGE - (k - low) / (high - low) * (HEIGHT - 2 * EDGE)
            yield f'<text x="{EDGE - 8}" y="{y:.0f}" text-anchor="end">{k}</text>'
        yield (
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            "whole network calls a picture</text>"
        )
        yield '<text x="8" y="20">PSNR in dB against 50 steps in float32, median</text>'
        yield "</svg>"

    return "\n".join(parts()) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.out.write_text(svg(read(args.results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
