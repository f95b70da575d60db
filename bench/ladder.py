"""From eager float32 to the fastest way: one change a rung, each with its speed, memory, quality.

A rung that fails, or is slower than the one before, stays: what did not help is a result too.

    sdengine bench ladder --model BUNDLE --steps 4 --runs 1 --out ladder.json

takes minutes on a full-size model: each rung loads and draws two pictures of so few steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.describe import size
from ..engine.errors import RequestError
from . import report as tables
from . import results as files
from . import run, stats, suite
from .cases import PROMPTS, Case
from .peers.client import Worker
from .results import Results


@dataclass(frozen=True)
class Rung:
    """changed     what differs from the rung before, in a few words
    load        keyword arguments of sdengine.load, beside the model
    request     fields of a Request, beside seed, size and steps
    """

    name: str
    changed: str
    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)


RUNGS = (
    Rung("eager", "torch, eager, float32: the yardstick", {"backend": "torch", "precision": "f32"}),
    Rung("torch-bfloat16", "bfloat16 weights and arithmetic, still torch",
         {"backend": "torch", "precision": "bf16"}),
    Rung("graph", "an engine instead of eager torch: ONNX Runtime",
         {"backend": "onnxruntime", "precision": "f32"}),
    Rung("compiled", "compiled for its shapes: OpenVINO",
         {"backend": "openvino", "precision": "f32"}),
    Rung("bfloat16", "bfloat16 arithmetic", {"backend": "openvino", "precision": "bf16"}),
    Rung("int8", "int8 where the bundle has it", {"backend": "openvino", "precision": "int8"}),
    Rung("cache", "two steps of three reuse the deep features of the third",
         {"backend": "openvino", "precision": "int8"}, {"cache": 3}),
)  # fmt: skip


def read(path: Path) -> tuple[Rung, ...]:
    """Rungs from JSON: [{"name", "changed", "load", "request"}, ...]. Raises RequestError."""
    try:
        rungs = tuple(Rung(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"no rungs in {path}: {error}",
            hint='write a JSON list of {"name": ..., "changed": ..., "load": {...}, '
            '"request": {...}}',
        ) from error
    if len({rung.name for rung in rungs}) != len(rungs) or not rungs:
        raise RequestError(
            f"{path} has {len(rungs)} rungs, and names that are not all different",
            hint="give at least one rung, each with a name of its own",
        )
    return rungs


def climb(
    model: str,
    rungs: Sequence[Rung],
    out: Path,
    report: suite.Report,
    *,
    overrides: Mapping[str, Any],
    prompts: tuple[str, ...] = PROMPTS,
    runs: int = 3,
    warmups: int = 1,
    reference: str = suite.REFERENCE_BACKEND,
    command: Sequence[str] = run.OWN,
) -> Results:
    """Measure each rung as a row; `out` as suite.bench keeps it. Raises as suite.bench does."""
    with Worker(command) as worker:
        backends = [str(rung.load["backend"]) for rung in rungs if "backend" in rung.load]
        plan = worker.ask("plan", model=model, backends=list(dict.fromkeys(backends)))
    rows = [_case(rung, model, plan, overrides, prompts, runs, warmups) for rung in rungs]
    found = suite.measure(rows, out, report, plan, reference=reference, warm_start=False,
                          command=command)  # fmt: skip
    changed = {f"rung/{rung.name}": rung.changed for rung in rungs}
    for row in found.rows:
        if row["name"] in changed:
            row["changed"] = changed[row["name"]]
    files.save(found, out)
    return found


def _case(
    rung: Rung,
    model: str,
    plan: Mapping[str, Any],
    overrides: Mapping[str, Any],
    prompts: tuple[str, ...],
    runs: int,
    warmups: int,
) -> Case:
    able = plan["backends"].get(rung.load.get("backend"), {"ok": True})
    return Case(
        f"rung/{rung.name}",
        {**overrides, **rung.request},
        {"model": model, **rung.load},
        prompts,
        runs,
        warmups,
        "" if able["ok"] else able["reason"],
        "" if able["ok"] else able["mend"],
    )


def markdown(results: Results) -> str:
    """The ladder as a table: each rung against the one before and against the first."""
    lines = ["| rung | what changed | picture | times as fast as the one before | as the first "
             "| peak memory | PSNR, SSIM (worst) |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    rows = [row for row in results.rows if "changed" in row]
    ran = [row for row in rows if row["ok"]]
    before = None
    for row in rows:
        name = row["name"].removeprefix("rung/")
        if not row["ok"]:
            lines.append(
                _line(name, row["changed"], f"failed: {row['failure']['error']}", *[""] * 4)
            )
            continue
        times = row["steady"]["total_s"]
        gains = ["" if other is None or other is row else _gain(other, row)
                 for other in (before, ran[0])]  # fmt: skip
        peak = row["memory"]["peak_bytes"]
        memory = "" if peak is None else size(peak)
        cells = (row["changed"], tables.spread(times), *gains, memory, tables.quality(row))
        lines.append(_line(name, *cells))
        before = row
    return "\n".join([*lines, "", tables.conditions_line(results)]) + "\n"


def _gain(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> str:
    samples = [row["steady"]["total_s"]["samples"] for row in (fast, slow)]
    found = stats.ratio(*samples)
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
