"""The GPU visit: what is due, what stays when time is up, pieces of wheels, and a rehearsed row."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from sdengine.bench import gpu_row, gpu_visit
from sdengine.bench.gpu_visit import CASES, FIRST, RUNGS, Visit

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_visit.sh"


def visit(folder, seconds=1000.0, **options):
    return Visit(folder, False, time.monotonic() + seconds, **options)


def test_the_ladder_is_that_of_the_issue():
    sizes = {(c.side, c.steps, c.batch) for c in CASES}
    assert sizes == {
        (512, 20, 1),
        (512, 20, 4),
        (768, 20, 1),
        (768, 20, 4),
        (512, 1, 1),
        (512, 4, 1),
    }
    assert [c.guidance for c in CASES if c.name.startswith("turbo")] == [1.0, 1.0]
    names = [r.name for r in RUNGS]
    assert len(set(names)) == len(names)
    assert names[0] == gpu_visit.REFERENCE
    assert {r.backend for r in RUNGS} == {*gpu_visit.BACKENDS, None}
    assert [r.options for r in RUNGS if r.backend is None] == [{}, {"compiled": True}]


def test_what_was_measured_is_not_due_again(tmp_path):
    todo = list(gpu_visit.due(visit(tmp_path), []))
    assert len(todo) == len({(r.name, c.name) for r, c in todo}) == len(RUNGS) * len(CASES)
    wanted = [(rung, case) for case, rungs in FIRST.items() for rung in rungs]
    assert [(r.name, c.name) for r, c in todo[: len(wanted)]] == wanted
    names = [r.name for r, c in todo if c.name == CASES[0].name]
    assert names[0] == gpu_visit.REFERENCE, "pictures are compared with it"
    rest = [CASES.index(c) for _, c in todo[len(wanted) :]]
    assert rest == sorted(rest), "one case on all rungs before the next"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"rung": RUNGS[0].name, "case": {"name": CASES[0].name}, "ok": False})
        + '\n{"rung": "cut o'
    )
    left = list(gpu_visit.due(visit(tmp_path), gpu_visit.rows_of(rows)))
    assert left == todo[1:]


def test_a_row_that_this_visit_has_no_time_for_is_left_for_the_next(tmp_path, monkeypatch):
    (tmp_path / "models.json").write_text("{}")
    asked = []

    def one_row(visit, rung, case, place, limit):
        asked.append((rung.name, limit))
        if len(asked) == 3:
            return {"rung": rung.name, "case": {"name": case.name}, "ok": False, "failed": "time"}
        return {"rung": rung.name, "case": {"name": case.name}, "ok": False, "failed": "why"}

    monkeypatch.setattr(gpu_visit, "one_row", one_row)
    assert gpu_visit.ladder(visit(tmp_path, 100.0, limit_s=400.0)) is None
    assert [name for name, _ in asked] == list(FIRST["base 512 b1"][:3])
    assert all(limit <= 100 for _, limit in asked)
    assert len(gpu_visit.rows_of(tmp_path / "rows.jsonl")) == 2, "the third is due again"
    assert gpu_visit.ladder(visit(tmp_path, 20.0)) is None, "nothing is begun in the last seconds"
    # with time enough a row that takes too long is a row
    asked.clear()
    assert gpu_visit.first(visit(tmp_path, 1e6)) == {"rows": sum(map(len, FIRST.values()))}
    assert gpu_visit.ladder(visit(tmp_path, 1e6)) == {"rows": len(RUNGS) * len(CASES)}


def test_a_row_never_raises(tmp_path, monkeypatch):
    rung, case = RUNGS[0], CASES[0]

    def late(*_, **options):
        raise subprocess.TimeoutExpired("row", options["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    row = gpu_visit.one_row(visit(tmp_path), rung, case, {}, 7.0)
    assert (row["ok"], row["failed"], row["limit_s"]) == (False, "time", 7.0)

    def killed(*_, **options):
        assert options["env"].get("SDENGINE_TORCH") == rung.env.get("SDENGINE_TORCH")
        return subprocess.CompletedProcess([], -9, "half a li", "one\ntwo\n")

    monkeypatch.setattr(subprocess, "run", killed)
    row = gpu_visit.one_row(visit(tmp_path), rung, case, {}, 7.0)
    assert row["failed"] == "status -9: one / two"
    assert json.loads(json.dumps(row))["request"]["steps"] == 20


def test_stages_are_done_once_and_the_report_holds_them(tmp_path, monkeypatch):
    done = []
    for name in ("about", "models", "tests", "typed"):
        monkeypatch.setattr(gpu_visit, name, lambda v, n=name: (done.append(n), {"stage": n})[1])
    rows = iter([{"rows": 8}])
    monkeypatch.setattr(gpu_visit, "first", lambda v: next(rows))
    monkeypatch.setattr(gpu_visit, "ladder", lambda v: None)
    arguments = ["--out", str(tmp_path), "--budget", "100"]
    assert gpu_visit.main(arguments) == 3, "time was up"
    assert gpu_visit.main(arguments) == 3
    assert done == ["about", "models", "tests", "typed"]
    (tmp_path / "models.json").write_text('{"diffusers": null, "diffusers failed": "why"}')
    assert gpu_visit.main(arguments) == 3
    assert done.pop() == "models", "what failed is tried again"
    assert gpu_visit.main(["tests", *arguments]) == 0
    assert done == ["about", "models", "tests", "typed", "tests"], "asked for by name: done again"
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["about"], found["rows"]) == ({"stage": "about"}, [])
    assert gpu_visit.main(["report", *arguments]) == 0


@pytest.mark.export
def test_a_rehearsed_row(tmp_path):
    """The embedded model through torch's GPU backend on the processor, and its agreement."""
    job = {
        "backend": "torch-cuda", "precision": "f32", "options": {}, "runs": 1, "rehearse": True,
        "request": gpu_visit.REHEARSED[0].request(), "label": "one", "reference": "one",
        "models": {"bundle": str(gpu_visit.ROOT / "models" / "emoji")}, "folder": str(tmp_path),
    }  # fmt: skip
    row = gpu_row.ours(job)
    assert row["total_s"]["n"] == 1
    assert row["enqueue_s"]["n"] == 1, "two steps, one gap"
    assert 0 < row["step_s"] < row["total_s"]["most"]
    assert row["picture"].shape == (64, 64, 3)
    np.save(tmp_path / "one.npy", row["picture"])
    assert gpu_row.agreement(row["picture"], tmp_path, "one") is None, "equal"
    other = row["picture"].astype(int) + 1
    assert gpu_row.agreement(other, tmp_path, "one") == pytest.approx(48.13, abs=0.01)


def test_a_row_that_fails_says_why(tmp_path, monkeypatch, capsys):
    import io

    job = {"backend": None, "folder": str(tmp_path), "models": {"diffusers": None}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(job)))
    monkeypatch.setattr(gpu_row, "diffusers", lambda job: {}["x"])
    assert gpu_row.main() == 0
    assert json.loads(capsys.readouterr().out) == {"ok": False, "failed": "KeyError: 'x'"}


def shell(*arguments, **env):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], env={**os.environ, **env}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_large_wheels_travel_in_pieces(tmp_path):
    wheels, packed, there = tmp_path / "wheels", tmp_path / "packed", tmp_path / "there"
    wheels.mkdir()
    large = np.random.default_rng(0).bytes(250_000)
    (wheels / "large-1.whl").write_bytes(large)
    (wheels / "small-1.whl").write_bytes(b"small")
    assert shell("pack", wheels, packed, PIECE="100000").returncode == 0
    batches = sorted(packed.iterdir())
    assert [p.name for p in batches] == ["000", "001", "002"]
    assert sorted(p.name for b in batches for p in b.iterdir()) == [
        "large-1.whl.part000", "large-1.whl.part001", "large-1.whl.part002", "large-1.whl.sha256",
        "small-1.whl",
    ]  # fmt: skip
    assert max(sum(p.stat().st_size for p in b.iterdir()) for b in batches) <= 100_000
    for batch in batches:
        assert shell("take", batch, WHEELS=str(there)).returncode == 0
    assert shell("join", there).returncode == 0
    joined = (there / "large-1.whl").read_bytes()
    assert hashlib.sha256(joined).digest() == hashlib.sha256(large).digest()
    assert shell("join", there).returncode == 0, "again is no harm"
    (there / "large-1.whl").unlink()
    (there / "large-1.whl.part001").unlink()
    failed = shell("join", there)
    assert failed.returncode == 1
    assert "large-1.whl is not whole: a piece is missing" in failed.stderr
    assert not (there / "large-1.whl").exists()


def test_the_wheels_are_those_that_the_machine_lacks():
    names = {line.partition("==")[0] for line in shell("wanted").stdout.splitlines()}
    assert {"onnx", "onnx-ir", "safetensors", "diffusers", "pytest", "cuda-bindings"} <= names
    assert {"onnxruntime-gpu", "tensorrt_rtx_cu13_libs", "httpx2"} <= names
    absent = {"torch", "torchvision", "triton", "onnxruntime", "nvidia-cuda-nvrtc", "ray"}
    assert not absent & names


def test_what_is_there_already_is_not_fetched(tmp_path):
    have = tmp_path / "have.txt"
    have.write_text("ml_dtypes==0.5\nSafeTensors @ file:///x\nonnx-ir\nhttpx==1\n")
    before, after = (
        {line.partition("==")[0] for line in shell("wanted", **env).stdout.splitlines()}
        for env in ({}, {"HAVE": str(have)})
    )
    assert before - after == {"ml_dtypes", "safetensors", "onnx-ir", "httpx"}
    assert "httpx2" in after, "another package"


def test_what_was_half_made_is_made_again(tmp_path, monkeypatch):
    """A checkpoint that a limit cut off has another name; one that is there stays."""
    commands = []

    def run(command, limit, env=None):
        commands.append(command[1])
        if command[1].endswith("make_checkpoint.py"):
            Path(command[-1]).write_bytes(b"half")
            return "" if limit > 50 else "timed out"
        Path(command[3]).mkdir()
        return ""

    monkeypatch.setattr(gpu_visit, "_run", run)
    rehearsal = Visit(tmp_path, True, time.monotonic() + 5)
    assert gpu_visit.models(rehearsal) is None, "time was up: not to be kept as it is"
    assert not (tmp_path / "models" / "checkpoint.safetensors").exists()
    found = gpu_visit.models(Visit(tmp_path, True, time.monotonic() + 100))
    assert found["checkpoint"] == str(tmp_path / "models" / "checkpoint.safetensors")
    assert found["bundle"].endswith("emoji")
    assert found["diffusers"] is not None
    again = len(commands)
    assert gpu_visit.models(rehearsal)["checkpoint"] == found["checkpoint"]
    assert len(commands) == again


def test_without_a_word_it_says_how():
    said = shell()
    assert said.returncode == 2
    assert "gpu_visit.sh pack WHEELS OUT" in said.stdout
