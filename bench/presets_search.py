"""Searches the knobs of a speed preset, and keeps what no other setting beats at its cost.

    python -m sdengine.bench.presets_search --out presets.jsonl --prompts 64 --minutes 60

Each setting is a Preset: sampler, schedule, steps, cache interval or rows, cut, guidance interval.
The first round tries them on a few prompts, by chance and, more and more, one knob away from those
on the Pareto front of cost and quality. The last round tries what lies on the front, and close to
it, on all prompts. Quality is the PSNR of the picture against the same seed in float32
with the steps of --reference; a fast setting must beat plain fewer steps, which are in the search.

The file has one JSON line a setting and number of prompts, and is read again at the next start:
what it holds is not drawn twice. `--front` prints the front of what is there, and draws nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import api, backends
from ..engine import images, latents, schedule, solvers
from ..engine.bundle import Bundle, open_bundle
from ..engine.errors import RequestError
from ..engine.guidance import Guidance
from ..engine.loop import denoise
from ..engine.noise import TorchNoise
from ..engine.ports import Array
from ..engine.presets import Preset, cost, costs_of, quadratic_rows
from ..engine.schedule import Training
from ..engine.spec import Precision
from ..engine.table import Table
from ..engine.tokenizer import Tokenizer
from . import quality

SUBJECTS = Path(__file__).parents[1] / "models" / "recipe" / "subjects.txt"
REFERENCE = Preset("f32", 50, "dpmpp_2m")
MOST = 99.0  # dB, of equal pictures: JSON has no infinity
NEARBY = 0.7  # of the first round's settings: one knob away from the front
NEAR_DB = 1.0  # how far below the front a setting of the first round may lie
STEPS = (6, 8, 10, 12, 14, 16, 18, 20, 25)
# An interval, or where the deep rows are densest.
CACHES: tuple[int | str, ...] = (1, 2, 3, 4, 5, "early", "middle")
INTERVALS = (None, (0.2, 20.0), (0.5, 20.0), (0.0, 6.0), (0.2, 6.0))
CENTRES = {"early": 0.2, "middle": 0.5}

Knobs = tuple[Any, ...]  # sampler, schedule, steps, cache, cut, interval


class Drawer:
    """Pictures of one model: texts and networks are kept."""

    def __init__(
        self, bundle: Bundle, backend: str, precision: Precision, threads: int | None, scale: float
    ) -> None:
        self.bundle, self.scale = bundle, scale
        noise = bundle.facts.schedule
        self._training = Training.scaled_linear(noise.beta_start, noise.beta_end, noise.timesteps)
        found = backends.get(backend)
        self._sessions = api.EngineSessions(bundle, found, precision, threads)
        self._tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
        self._texts: dict[str, Array] = {}

    def table(self, preset: Preset) -> Table:
        """Raises RequestError where sampler, schedule and steps do not go together."""
        own = solvers.find(preset.sampler).schedule
        spacing = own if preset.schedule is None else preset.schedule
        levels = schedule.make(spacing, self._training, preset.steps)
        table = solvers.make(preset.sampler, levels, self.bundle.facts.prediction)
        return preset.columns(table, self.scale)

    def draw(self, preset: Preset, prompt: str, seed: int) -> Array:
        """uint8 [H, W, 3]"""
        facts, table = self.bundle.facts, self.table(preset)
        height, width = (s // facts.latent.factor for s in facts.native_size)
        shape = (facts.latent.channels, height, width)
        stream = TorchNoise(seed)
        x = table.start_noise * stream.normal(shape)[None].astype(np.float32)
        predict = Guidance(
            self._sessions, self._text(""), self._text(prompt), rescale=preset.rescale
        )
        draw_noise = partial(_normal, stream, shape)
        *_, last = denoise(table, predict, x.astype(np.float32), draw_noise)
        return images.to_uint8(latents.decode(self._sessions, last.x[0], facts.latent.scale))

    def _text(self, prompt: str) -> Array:
        if prompt not in self._texts:
            ids = np.array([self._tokenizer.encode(prompt).ids], np.int64)
            session = self._sessions("text_encoder", {"B": 1})
            self._texts[prompt] = session({"input_ids": ids})["last_hidden_state"]
        return self._texts[prompt]

    def close(self) -> None:
        self._sessions.close()


@dataclass(frozen=True)
class Found:
    """One setting on the first prompts: what a line of the file holds.

    cost        in calls of the full UNet with both halves
    psnr_db     of each prompt
    """

    preset: Preset
    cost: float
    psnr_db: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.psnr_db))

    def line(self) -> dict[str, Any]:
        summary = {"median": round(self.median, 2), "worst": round(min(self.psnr_db), 2)}
        rounded = [round(v, 2) for v in self.psnr_db]
        knobs = asdict(self.preset)
        return {"preset": knobs, "cost": round(self.cost, 3), **summary, "psnr_db": rounded}

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Found:
        known = {f.name for f in fields(Preset)}
        preset: Mapping[str, Any] = line["preset"]
        knobs: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()
        }
        if unknown := set(knobs) - known:
            raise RequestError(
                f"the results know knobs that presets have not: {', '.join(sorted(unknown))}",
                hint="write to another file with --out",
            )
        return cls(Preset(**knobs), line["cost"], tuple(line["psnr_db"]))


def settings(costs: Mapping[str, float], samplers: Sequence[str]) -> dict[Knobs, None]:
    """All combinations of knobs, each once; some of them no solver can run."""
    cuts = sorted(int(n.removeprefix("shallow")) for n in costs if n.startswith("shallow"))
    spacings = [n for n in schedule.SCHEDULES if n != "reference"]  # which is `leading`
    caches: tuple[int | str, ...] = CACHES if cuts else (1,)
    lists = (samplers, spacings, STEPS, caches, cuts or [0], INTERVALS)
    # without a cache the cut says nothing
    return {k: None for k in itertools.product(*lists) if k[3] != 1 or k[4] == 0}


def priced(
    drawer: Drawer, costs: Mapping[str, float], knobs: Knobs, precision: Precision, limit: float
) -> tuple[Preset, float] | None:
    """The preset of these knobs and its cost; None where no solver has them, or above the limit."""
    sampler, spacing, steps, cache, cut, interval = knobs
    preset = Preset(precision, steps, sampler, spacing, 1, cut, interval)
    try:
        preset = replace(preset, cache=_rows(cache, len(drawer.table(preset))))
        price = cost(drawer.table(preset), costs)
    except RequestError:
        return None
    return (preset, price) if price <= limit else None


def one_away(knobs: Knobs, others: Mapping[Knobs, Any]) -> list[Knobs]:
    """Those of `others` that differ in one knob."""
    values = [sorted({o[i] for o in others}, key=repr) for i in range(len(knobs))]
    changed = ((*knobs[:i], v, *knobs[i + 1 :]) for i, row in enumerate(values) for v in row)
    return [o for o in changed if o in others]


def _rows(cache: int | str, rows: int) -> int | tuple[int, ...]:
    if isinstance(cache, int):
        return cache
    return tuple(quadratic_rows(rows, max(2, rows // 3), CENTRES[cache] * rows))


def front(found: Iterable[Found]) -> list[Found]:
    """Those that no cheaper or equally cheap one surpasses, cheapest first."""
    best: list[Found] = []
    for one in sorted(found, key=lambda f: (f.cost, -f.median)):
        if not best or one.median > best[-1].median:
            best.append(one)
    return best


def promising(found: Sequence[Found]) -> list[Found]:
    """The front and what lies close below it, best first."""
    best = front(found)

    def short(one: Found) -> float:
        return max(b.median for b in best if b.cost <= one.cost) - one.median

    return sorted((f for f in found if short(f) <= NEAR_DB), key=short)


def psnr(a: Array, b: Array) -> float:
    """dB; of equal pictures 99, which JSON can hold."""
    square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return min(99.0, 10 * np.log10(255**2 / square)) if square else 99.0


def read(path: Path) -> list[Found]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Found.read(json.loads(line)) for line in lines if line.endswith("}")]


def prompts_of(path: Path, count: int) -> list[str]:
    """The first phrase of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    phrases = [line.split(";")[0].strip() for line in lines if line and line[0] != "#"]
    return [p.partition(" ")[2] if not p[0].isascii() else p for p in phrases][:count]


def search(args: argparse.Namespace) -> list[Found]:
    bundle = open_bundle(api.find_model(args.model))
    prompts = prompts_of(args.subjects, args.prompts)
    deadline = time.monotonic() + 60 * args.minutes
    known = {(f.preset, len(f.psnr_db)): f for f in read(args.out)}
    exact = Drawer(bundle, args.backend, "f32", args.threads, args.guidance)
    reference = replace(REFERENCE, steps=args.reference)
    wanted: list[Array] = []
    drawer = Drawer(bundle, args.backend, args.precision, args.threads, args.guidance)

    def measure(preset: Preset, price: float, count: int) -> Found:
        for i in range(len(wanted), count):
            wanted.append(exact.draw(reference, prompts[i], args.seed + i))
        if (preset, count) in known:
            return known[preset, count]
        values = [
            min(MOST, quality.psnr(drawer.draw(preset, prompts[i], args.seed + i), wanted[i]))
            for i in range(count)
        ]
        found = known[preset, count] = Found(preset, price, tuple(values))
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found.line()) + "\n")
        return found

    samplers = args.samplers.split(",") if args.samplers else list(solvers.SOLVERS)
    costs = costs_of(bundle.components["unet"])
    todo = settings(costs, samplers)
    chance = random.Random(args.seed)
    tried: dict[Found, Knobs] = {}
    while todo and time.monotonic() < deadline - 60 * args.minutes * args.last_round:
        near = [k for one in front(tried) for k in one_away(tried[one], todo)]
        knobs = chance.choice(near if near and chance.random() < NEARBY else list(todo))
        todo.pop(knobs)
        setting = priced(drawer, costs, knobs, args.precision, args.limit)
        if setting is None:
            continue
        found = measure(*setting, min(args.first, len(prompts)))
        tried[found] = knobs
        _say(f"first round {len(tried)} of {len(tried) + len(todo)}")
    last: list[Found] = []
    for i, one in enumerate(promising(list(tried))):
        if time.monotonic() > deadline:
            break
        last.append(measure(one.preset, one.cost, len(prompts)))
        _say(f"last round {i + 1}")
    exact.close()
    drawer.close()
    return front(last)


def _normal(stream: TorchNoise, shape: tuple[int, int, int]) -> Array:
    return stream.normal(shape)[None]


def _say(text: str) -> None:
    sys.stderr.write(f"\r{text} ")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="bf16", choices=("f32", "bf16", "int8"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--samplers", help="their names, with commas; all of them by default")
    parser.add_argument("--subjects", type=Path, default=SUBJECTS, help="a prompt a line")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--first", type=int, default=6, help="prompts of the first round")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--last-round", type=float, default=0.4, help="its share of the minutes")
    parser.add_argument("--limit", type=float, default=16.0, help="the highest cost, in full calls")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--reference", type=int, default=REFERENCE.steps, help="its steps")
    parser.add_argument("--front", action="store_true", help="print what is there, draw nothing")
    args = parser.parse_args(arguments)
    if args.front:
        found = read(args.out)
        most = max((len(f.psnr_db) for f in found), default=0)
        best = front(f for f in found if len(f.psnr_db) == most)
    else:
        best = search(args)
    for one in best:
        sys.stdout.write(json.dumps(one.line()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
