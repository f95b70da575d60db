"""Measures rows: each in a process of its own, with its reference, limits and failures.

A row, in plain JSON types; times in seconds:

    name, case              what was measured (cases.Case)
    ok                      false: `failure` {"error", "hint", "stage"} instead of the rest
    about                   model, bundle, backend, precision, as pictures carry them
    cold_start              of a process without compiled networks in the cache: interpreter_s,
                            import_s, load_s, build_s, to_first_step_s, to_first_picture_s
    warm_start              the same with them
    steady                  total_s, text_s, denoise_s, decode_s, own_s, step_s: stats.summary each
    components              for each network, kind of call and shape: calls a picture, seconds,
                            flop, flops, share of the machine's rate
    memory                  peak_bytes of a whole life, loaded_bytes before the first picture
    disk                    bundle_bytes, cache_bytes (compiled networks of this row)
    quality                 against `reference`, over the case's prompts; null with `why` where
                            there is none
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import SdengineError
from . import quality, stats
from .cases import Case
from .peers.client import Worker
from .results import Row

OWN = (sys.executable, "-m", "sdengine.bench.worker")
STAGES = ("total_s", "text_s", "denoise_s", "decode_s", "own_s")


def measure(
    case: Case, folder: Path, *, command: Sequence[str] = OWN, warm_start: bool = True
) -> Row:
    """One row; its pictures as `<folder>/<number of the prompt>.npy`. Never raises SdengineError:
    what failed is in the row."""
    row: Row = {"name": case.name, "case": case.to_dict(), "ok": False}
    if case.refused:
        return {**row, "failure": failure("probe", case.refused, case.hint)}
    folder.mkdir(parents=True, exist_ok=True)
    stage = "start"
    with _empty_cache() as cache:
        env = {
            "SDENGINE_CACHE": str(cache),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        try:
            with Worker(command, env) as worker:
                stage = "load"
                loaded = worker.ask("load", options=dict(case.load), spawned=worker.spawned)
                stage = "first picture"
                first = worker.ask("run", request=_request(case, 0))
                stage = "steady"
                for index in range(1, case.warmups):
                    worker.ask("run", request=_request(case, index))
                runs = list(_steady(worker, case, folder))
            row |= {
                "about": loaded["about"],
                "cold_start": start_figures(loaded, first),
                "steady": steady_figures(runs),
                "components": component_figures(runs),
                "memory": {
                    "peak_bytes": runs[-1]["peak_bytes"],
                    "loaded_bytes": loaded["peak_bytes"],
                },
                "disk": {"cache_bytes": _bytes(cache)},
                "warnings": first["warnings"],
            }
            if warm_start:
                stage = "warm start"
                with Worker(command, env) as worker:
                    loaded = worker.ask("load", options=dict(case.load), spawned=worker.spawned)
                    first = worker.ask("run", request=_request(case, 0))
                row["warm_start"] = start_figures(loaded, first)
        except SdengineError as error:
            return {**row, "failure": failure(stage, error.message, error.hint)}
    return {**row, "ok": True}


def failure(stage: str, error: str, hint: str) -> dict[str, str]:
    return {"stage": stage, "error": error, "hint": hint}


def _request(case: Case, index: int) -> dict[str, Any]:
    return {**case.request, "prompt": case.prompts[index % len(case.prompts)]}


def _steady(worker: Worker, case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    """Each prompt at least once; the first round's pictures are kept."""
    for index in range(max(case.runs, len(case.prompts))):
        picture = folder / f"{index}.npy" if index < len(case.prompts) else None
        kept = None if picture is None else str(picture)
        yield worker.ask("run", request=_request(case, index), picture=kept)


def start_figures(loaded: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    return {
        "interpreter_s": loaded["interpreter_s"],
        "import_s": loaded["import_s"],
        "load_s": loaded["load_s"],
        "build_s": first["stages"]["load_s"],
        "to_first_step_s": first["first_step_at"],
        "to_first_picture_s": first["done_at"],
    }


def steady_figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = {name: stats.summary([run["stages"][name] for run in runs]) for name in STAGES}
    return {**figures, "step_s": stats.summary([t for run in runs for t in run["rows"]])}


def component_figures(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls of all runs together; opening a network that is loaded already is no work."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        for call in run["calls"]:
            if call["what"] == "open":
                continue
            key = f"{call['component']} {call['what']} {sorted(call['dims'].items())}"
            kept = groups.setdefault(key, {**call, "seconds": []})
            kept["seconds"] += call["seconds"]
    return [
        {
            **{k: group[k] for k in ("component", "what", "dims")},
            "calls": len(group["seconds"]) / len(runs),
            "seconds": stats.summary(group["seconds"]),
        }
        for group in groups.values()
    ]


def judge(row: Row, reference: Row, folder: Path, theirs: Path) -> None:
    """Put the quality of a row's pictures into it. `theirs`: the reference's pictures."""
    if not row["ok"]:
        return
    if not reference["ok"]:
        why = f"its reference {reference['name']} failed: {reference['failure']['error']}"
        row |= {"quality": None, "why": why}
        return
    count = len(row["case"]["prompts"])
    pairs = [[np.load(at / f"{i}.npy") for at in (folder, theirs)] for i in range(count)]
    row["quality"] = {
        "reference": reference["name"],
        **quality_figures([quality.compare(ours, other) for ours, other in pairs]),
    }


def quality_figures(found: Sequence[quality.Quality]) -> dict[str, Any]:
    """Median and worst over pictures. An equal picture has endless decibels; null stands for it."""
    decibels = [np.inf if q.psnr_db is None else q.psnr_db for q in found]
    middle, worst = float(np.median(decibels)), min(decibels)
    return {
        "pictures": len(found),
        "equal": sum(q.psnr_db is None for q in found),
        "psnr_db": {"median": _finite(middle), "worst": _finite(worst)},
        "ssim": _spread([q.ssim for q in found], min),
        "ssim_rgb": _spread([q.ssim_rgb for q in found], min),
        "gmsd": _spread([q.gmsd for q in found], max),
        "each": [q.to_dict() for q in found],
    }


def _spread(values: list[float], worst: Callable[[list[float]], float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "worst": worst(values)}


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else float(value)


@contextmanager
def _empty_cache() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sdengine-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
