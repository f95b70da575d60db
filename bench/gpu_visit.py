"""What happens on a machine that has a GPU for half an hour: `bash bench/gpu_visit.sh run`.

Stages, each of which leaves a file in OUT and is not done twice, the most valuable first:

    about     the machine, the libraries, what each GPU backend says of itself
    models    a checkpoint of the full size with random weights, its bundle, a diffusers folder
    first     the rows of FIRST: torch with CUDA graphs beside diffusers, eager and compiled
    tests     the contract of backends, and parity, on each GPU backend that can run
    typed     float16 graphs into the bundle, which ONNX Runtime and TensorRT run
    ladder    all rungs x cases, each in a process of its own with a limit: rows.jsonl
    report    results.json, for bench/results/

A row that fails stays, with its reason. Quality is measured against float32 of torch on the same
GPU, on the same seed; weights are random, so pictures are noise, and their agreement means as much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGES = ("about", "models", "first", "tests", "typed", "ladder", "report")
BACKENDS = ("torch-cuda", "onnxruntime-cuda", "onnxruntime-trt", "trt", "trt-rtx")
REFERENCE = "torch-cuda f32"


@dataclass(frozen=True)
class Rung:
    """What is measured. `backend` None: diffusers, set by `options`.

    env     of its process
    """

    name: str
    backend: str | None
    precision: str = "f16"
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


RUNGS = (
    Rung(REFERENCE, "torch-cuda", "f32"),
    Rung("torch-cuda f16", "torch-cuda"),
    Rung("diffusers f16", None),
    Rung("torch-cuda f16 compiled", "torch-cuda", env={"SDENGINE_TORCH": "compile"}),
    Rung("diffusers f16 compiled", None, options={"compiled": True}),
    Rung("onnxruntime-cuda f16", "onnxruntime-cuda"),
    Rung("trt f16", "trt"),
    Rung("trt-rtx f16", "trt-rtx"),
    Rung("onnxruntime-trt f16", "onnxruntime-trt"),
    Rung("torch-cuda bf16", "torch-cuda", "bf16"),
    Rung("torch-cuda f16 eager", "torch-cuda", env={"SDENGINE_TORCH": "eager"}),
)


@dataclass(frozen=True)
class Case:
    """side in pixels; pictures in one batch"""

    name: str
    side: int
    steps: int
    batch: int = 1
    guidance: float = 7.5

    def request(self) -> dict[str, Any]:
        return {
            "prompt": "a photograph of an astronaut riding a horse", "sampler": "ddim",
            "width": self.side, "height": self.side, "steps": self.steps, "seed": 20261123,
            "guidance": self.guidance, "count": self.batch, "batch_size": self.batch,
        }  # fmt: skip


CASES = (
    Case("base 512 b1", 512, 20),
    Case("turbo 1 step", 512, 1, guidance=1.0),
    Case("base 512 b4", 512, 20, 4),
    Case("turbo 4 steps", 512, 4, guidance=1.0),
    Case("768 b1", 768, 20),
    Case("768 b4", 768, 20, 4),
)
# What a visit that is cut short should have measured: case -> rungs, in this order.
FIRST: Mapping[str, tuple[str, ...]] = {
    "base 512 b1": (REFERENCE, "torch-cuda f16", "diffusers f16 compiled", "diffusers f16",
                    "torch-cuda f16 compiled"),
    "turbo 1 step": (REFERENCE, "torch-cuda f16", "diffusers f16"),
}  # fmt: skip
REHEARSED = (Case("base 512 b1", 64, 2), Case("turbo 1 step", 64, 1, guidance=1.0))


@dataclass(frozen=True)
class Visit:
    """limit_s      of one row, its start and compiling included
    runs            timed pictures, after as many that are not as fill the caches"""

    out: Path
    rehearse: bool
    deadline: float
    limit_s: float = 200.0
    runs: int = 10

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def cases(self) -> tuple[Case, ...]:
        return REHEARSED if self.rehearse else CASES

    def rungs(self) -> tuple[Rung, ...]:
        return RUNGS[:5] if self.rehearse else RUNGS


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far; a line that a kill cut off does not count."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def due(visit: Visit, done: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Rung, Case]]:
    """Rows that are still to be measured: those of FIRST, then case after case on all rungs."""
    known = {(row["rung"], row["case"]["name"]) for row in done}
    cases, rungs = {c.name: c for c in visit.cases()}, {r.name: r for r in visit.rungs()}
    for case_name, names in FIRST.items():
        for name in names:
            if name in rungs and (name, case_name) not in known:
                known.add((name, case_name))
                yield rungs[name], cases[case_name]
    for case in visit.cases():
        for rung in visit.rungs():
            if (rung.name, case.name) not in known:
                yield rung, case


def about(visit: Visit) -> dict[str, Any]:
    """The machine, and what every backend for a GPU says, TensorRT-RTX's no included."""
    from .. import backends
    from ..backends.doctor import PACKAGES, conflicts, installed
    from . import env

    said = {name: asdict(backends.get(name).probe()) for name in BACKENDS if name in backends.GPU}
    return {
        "conditions": env.conditions(),
        "commit": env.commit(),
        "gpu": _output(["nvidia-smi"]),
        "packages": {name: installed(name) for name in (*PACKAGES, "diffusers", "triton")},
        "conflicts": [asdict(c) for c in conflicts()],
        "backends": said,
        "trt-rtx builds": _rtx_builds(),
        "matrix product": _ceiling(visit.rehearse),
    }


def _rtx_builds() -> str:
    """What TensorRT-RTX says to an engine for this GPU."""
    try:
        import tensorrt_rtx as rtx  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import torch

        major, minor = torch.cuda.get_device_capability()
    except Exception as error:
        return f"not tried: {error}"
    listed = [n for n in rtx.ComputeCapability.__members__ if n.startswith("SM")]
    wanted = f"SM{major}{minor}"
    where = "is" if wanted in listed else "is not"
    return f"{rtx.__version__}: {wanted} {where} in its list, {', '.join(sorted(listed))}"


def _ceiling(rehearse: bool) -> dict[str, float]:
    """The GPU's rate of matrix products by torch, operations a second, best of 10."""
    import torch

    side, place = (256, "cpu") if rehearse else (8192, "cuda")
    found = {}
    for name in ("float16", "bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=place).to(getattr(torch, name)) for _ in range(2))
        best = min(_timed(lambda a=a, b=b: a @ b, place) for _ in range(10))  # type: ignore[misc]
        found[name] = 2 * side**3 / best
    return found


def _timed(work: Callable[[], object], place: str) -> float:
    import torch

    start = time.perf_counter()
    work()
    if place == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def models(visit: Visit) -> dict[str, Any]:
    """OUT/models: checkpoint, bundle, diffusers. In a rehearsal diffusers gets a tiny one,
    and our own rows the embedded model. None when time was up: what was made is kept."""
    folder = visit.out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    draw = ["tests/golden/data/make_checkpoint.py", "--variant", "base", "--quiet"]
    draw += ["--scale", "tiny" if visit.rehearse else "full", "--out"]
    other = ["bench/peers/make_diffusers.py", str(checkpoint)]
    steps: list[list[_Making]] = [[_Making(checkpoint, draw)]]
    steps += [[_Making(folder / "diffusers", other, ["16"] if visit.rehearse else [])]]
    if not visit.rehearse:
        make = ["-m", "sdengine.bench.gpu_models", "whole", str(checkpoint)]
        steps[-1] += [_Making(folder / "bundle", make)]
    found: dict[str, Any] = {}
    for together in steps:  # side by side: each is of few processors
        with ThreadPoolExecutor(len(together)) as pool:
            for part in pool.map(lambda one: one.made(visit), together):
                found |= part
    if visit.rehearse:
        found["bundle"] = str(ROOT / "models" / "emoji")
    late = visit.left_s < 10 and any(key.endswith(" failed") for key in found)
    return None if late else found


@dataclass(frozen=True)
class _Making:
    """A file or folder, and the command that makes it: its place comes before `rest`."""

    place: Path
    command: Sequence[str]
    rest: Sequence[str] = ()

    def made(self, visit: Visit) -> dict[str, Any]:
        """Whole or not at all, unless it is there; what it took, or met."""
        start, name = time.monotonic(), self.place.stem
        partial = self.place.with_name(f"partial-{self.place.name}")
        failed = ""
        if not self.place.exists():
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, *self.command, str(partial), *self.rest]
            failed = _run(command, visit.left_s)
            if not failed:
                partial.rename(self.place)
        place = str(self.place) if self.place.exists() else None
        found = {name: place, f"{name} s": time.monotonic() - start}
        return {**found, f"{name} failed": failed} if failed else found


def typed(visit: Visit) -> dict[str, Any]:
    """float16 graphs, judged on the processor, in the bundle; the embedded one stays as it is."""
    bundle = _read(visit.out / "models.json")["bundle"]
    if bundle is None:
        return {"failed": "no bundle was made"}
    if visit.rehearse:
        bundle = str(shutil.copytree(bundle, visit.out / "models" / "typed", dirs_exist_ok=True))
    start = time.monotonic()
    command = [sys.executable, "-m", "sdengine.bench.gpu_models", "typed", bundle]
    return {"failed": _run(command, visit.left_s), "seconds": time.monotonic() - start}


def tests(visit: Visit) -> dict[str, Any]:
    """backend -> how its contract tests ended on the embedded model, and its parity with torch on
    the processor. In a rehearsal the contract is that of torch on the processor."""
    said = _read(visit.out / "about.json")["backends"]
    able = [name for name, probe in said.items() if probe["ok"]]
    found: dict[str, Any] = {n: {"refused": said[n]["reason"]} for n in said if n not in able}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/contract/test_backends.py"]
    known = {
        "SDENGINE_TINY_BUNDLE": str(ROOT / "models" / "emoji"),
        "SDENGINE_CONTRACT_MAX_ABS": "5e-3",  # shown noise; parity is on recorded inputs
    }
    for name in ["torch-cuda"] if visit.rehearse else able:
        tested = "torch" if visit.rehearse else name
        env = {**os.environ, **known, "SDENGINE_CONTRACT": tested, "CI": "true"}
        start = time.monotonic()
        failed = _run(command, min(visit.left_s, visit.limit_s), env)
        found[name] = {"ok": not failed, "seconds": time.monotonic() - start, "failed": failed}
        found[name]["parity"] = _parity(visit, name)
    return found


def _parity(visit: Visit, name: str) -> dict[str, Any]:
    """What bench/gpu_parity.py says. Never raises."""
    rehearsed = ["--rehearse"] if visit.rehearse else []
    limit = max(1.0, min(visit.left_s, visit.limit_s))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sdengine.bench.gpu_parity", name, *rehearsed], cwd=ROOT,
            capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"ok": False, "failed": "time"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return {"ok": False, "failed": " / ".join(done.stderr.strip().splitlines()[-3:])}
    return found


def first(visit: Visit) -> dict[str, Any] | None:
    return ladder(visit, only=FIRST)


def ladder(
    visit: Visit, only: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, Any] | None:
    """Append rows until all are there (then a summary) or time is up (None)."""
    path = visit.out / "rows.jsonl"
    place = _read(visit.out / "models.json")
    for rung, case in list(due(visit, rows_of(path))):
        if only is not None and rung.name not in only.get(case.name, ()):
            continue
        if visit.left_s < 30:
            return None
        limit = min(visit.limit_s, visit.left_s)
        row = one_row(visit, rung, case, place, limit)
        if row.get("failed") == "time" and limit < visit.limit_s:
            return None  # the next visit has the whole limit for it
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        _say(f"{rung.name:<26} {case.name:<14} {_short(row)}")
    return {"rows": len(rows_of(path))}


def one_row(
    visit: Visit, rung: Rung, case: Case, place: Mapping[str, Any], limit: float
) -> dict[str, Any]:
    """Measured in a process of its own. Never raises."""
    row: dict[str, Any] = {"rung": rung.name, "case": asdict(case), "request": case.request()}
    job = {
        "backend": rung.backend, "precision": rung.precision, "options": dict(rung.options),
        "request": case.request(), "runs": 2 if visit.rehearse else visit.runs,
        "rehearse": visit.rehearse, "models": dict(place), "folder": str(visit.out / "pictures"),
        "label": f"{rung.name} {case.name}".replace(" ", "-"),
        "reference": f"{REFERENCE} {case.name}".replace(" ", "-"),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sdengine.bench.gpu_row"], input=json.dumps(job),
            capture_output=True, text=True, timeout=limit, check=False,
            env={**os.environ, **rung.env},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**row, "ok": False, "failed": "time", "limit_s": limit}
    try:
        return {**row, **json.loads(done.stdout.strip().rpartition("\n")[2])}
    except ValueError:
        tail = done.stderr.strip().splitlines()[-4:]
        return {**row, "ok": False, "failed": f"status {done.returncode}: {' / '.join(tail)}"}


def report(visit: Visit) -> dict[str, Any]:
    names = ("about", "models", "tests", "typed")
    parts = {name: _read(visit.out / f"{name}.json") for name in names}
    return {"format": 1, "rehearsal": visit.rehearse, **parts,
            "rows": rows_of(visit.out / "rows.jsonl")}  # fmt: skip


def _short(row: Mapping[str, Any]) -> str:
    if not row["ok"]:
        return f"failed: {row['failed']}"
    db = row.get("psnr_db")
    quality = "" if db is None else f"  {db:.1f} dB"
    return f"{1000 * row['total_s']['median']:.1f} ms a batch{quality}"


def _run(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> str:
    """ "" or why it failed."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(limit, 1),
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = (done.stdout + done.stderr).strip().splitlines()[-6:]
    return f"status {done.returncode}: {' / '.join(said)}"


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is done, 3 when time was up and another run goes on from here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE")
    parser.add_argument("--out", type=Path, default=Path("gpu-visit"))
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the processor")
    asked = parser.parse_args(arguments)
    visit = Visit(asked.out.resolve(), asked.rehearse, time.monotonic() + asked.budget)
    visit.out.mkdir(parents=True, exist_ok=True)
    work: dict[str, Callable[[Visit], dict[str, Any] | None]] = {
        "about": about, "models": models, "first": first, "tests": tests, "typed": typed,
        "ladder": ladder, "report": report,
    }  # fmt: skip
    for stage in asked.stages or STAGES:
        kept = visit.out / ("results.json" if stage == "report" else f"{stage}.json")
        done = kept.is_file() and not any(key.endswith(" failed") for key in _read(kept))
        if done and stage not in asked.stages and stage != "report":
            continue
        if visit.left_s < 10 and stage != "report":
            return 3
        found = work[stage](visit)
        if found is None:
            (visit.out / "results.json").write_text(json.dumps(report(visit), indent=1))
            return 3
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
        _say(f"{stage}: {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
