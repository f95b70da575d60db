"""Rows, references, failures and partial results, on a worker with known answers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sdengine.bench import cases, limits, results, run, suite
from sdengine.bench.cases import Case, Wish
from sdengine.bench.peers.client import Worker
from sdengine.bench.quality import Quality
from sdengine.engine.errors import BackendError, RequestError, StorageError, UnknownName

FAKE = (sys.executable, str(Path(__file__).parents[1] / "fake_worker.py"))
ABLE = {"a": {"ok": True, "precisions": ["bf16", "f32"]},
        "gone": {"ok": False, "reason": "not installed", "mend": "pip install it"}}  # fmt: skip


def case(name="one/a-f32", precision="f32", **load):
    return Case(name, {"steps": 3}, {"model": "m", "backend": "a", "precision": precision, **load},
                prompts=("x", "y"), runs=3)  # fmt: skip


def silent(*_):
    pass


# --- cases -------------------------------------------------------------------------------------


def test_a_wish_is_all_combinations():
    wish = Wish("m", ("a",), cases=("picture", "short"), threads=(1, 2), overrides={"width": 64})
    rows = list(cases.rows(wish, ABLE))
    first = [f"picture/a-{precision}-t{n}" for precision in ("bf16", "f32") for n in (1, 2)]
    assert [row.name for row in rows][:4] == first
    assert len(rows) == 8
    assert rows[-1].request == {"seed": cases.SEED, "steps": 8, "width": 64}
    assert rows[-1].load == {"model": "m", "backend": "a", "precision": "f32", "threads": 2}


def test_a_backend_that_cannot_run_is_a_row_with_its_reason():
    (row,) = cases.rows(Wish("m", ("gone",)), ABLE)
    assert (row.name, row.refused, row.hint) == ("picture/gone", "not installed", "pip install it")
    measured = run.measure(row, Path("/nowhere"))
    assert measured["failure"] == {"stage": "probe", "error": "not installed",
                                   "hint": "pip install it"}  # fmt: skip


def test_a_reference_is_float32_without_presets():
    fast = Case("picture/a-int8-t1", {"steps": 8, "preset": "high"},
                {"model": "m", "backend": "a", "precision": "int8", "threads": 1})  # fmt: skip
    slow = cases.reference(fast, "b")
    assert slow.name == "picture/b-f32-t1"
    assert slow.request == {"steps": 8}
    assert slow.load == {"model": "m", "backend": "b", "precision": "f32", "threads": 1}


def test_unknown_cases_and_bad_fields_are_refused():
    with pytest.raises(UnknownName, match="'pictur'") as caught:
        Wish("m", ("a",), cases=("pictur",))
    assert "picture" in caught.value.hint
    with pytest.raises(RequestError, match="steps is 0"):
        Wish("m", ("a",), overrides={"steps": 0})


def test_each_reference_comes_first_and_once():
    rows = [case("one/a-bf16", "bf16"), case("one/a-f32"), case("one/a-int8", "int8")]
    ordered, references = suite.with_references(rows, "a")
    assert [c.name for c in ordered] == ["one/a-f32", "one/a-bf16", "one/a-int8"]
    assert set(references.values()) == {"one/a-f32"}
    ordered, references = suite.with_references(rows[:1], "b")
    assert [c.name for c in ordered] == ["one/b-f32", "one/a-bf16"]
    assert references["one/a-bf16"] == "one/b-f32"


def test_references_that_differ_have_names_that_differ():
    """As a ladder's rungs with other numbers of steps, or one that has the reference's name."""
    few = Case("one/few", {"steps": 2}, case().load, ("x", "y"))
    clash = case("one/b-f32", "bf16")
    ordered, references = suite.with_references([case(), few, clash], "b")
    second, third = "one/b-f32-2", "one/b-f32-3"
    assert references == {"one/a-f32": second, "one/b-f32": second, "one/few": third,
                          second: second, third: third}  # fmt: skip
    assert [c.request["steps"] for c in ordered] == [3, 2, 3, 2, 3]


# --- one row -----------------------------------------------------------------------------------


def test_a_row_holds_what_the_worker_said(tmp_path):
    row = run.measure(case(seconds=2.5), tmp_path / "pictures", command=FAKE)
    assert row["ok"]
    assert row["steady"]["total_s"]["samples"] == [2.5] * 3
    assert row["steady"]["step_s"]["n"] == 3 * 3
    assert row["cold_start"] == row["warm_start"] == {
        "interpreter_s": 0.1, "import_s": 0.2, "load_s": 0.3, "build_s": 0.5,
        "to_first_step_s": 1.5, "to_first_picture_s": 3.0}  # fmt: skip
    (unet,) = row["components"]  # opening a network is not among the calls
    assert (unet["what"], unet["calls"], unet["seconds"]["median"]) == ("run", 3, 0.5)
    assert row["memory"]["peak_bytes"] > 10e6, "a Python process with numpy"
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["0.npy", "1.npy"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "error", "hint"),
    [
        ("refuse", "Refused: not this one", "do something else"),
        ("die", "the worker ended with status 3 at 'run'", "it said: these are my last words"),
        ("kill", "ended by SIGKILL, as the kernel does when memory runs out", "it said nothing"),
    ],
)
def test_a_failing_worker_is_a_row_with_its_reason(tmp_path, fault, error, hint):
    row = run.measure(case(), tmp_path, command=(*FAKE, fault))
    assert not row["ok"]
    assert row["failure"]["stage"] == "first picture"
    assert error in row["failure"]["error"]
    assert hint in row["failure"]["hint"]


def test_a_worker_that_never_answers_is_ended():
    with Worker((*FAKE, "hang")) as worker:
        worker.ask("load", options={})
        with pytest.raises(BackendError, match=r"no answer to 'run' within 0\.2 s") as caught:
            worker.ask("run", timeout=0.2, request={})
    assert "more time" in caught.value.hint
    assert worker._process.poll() is not None


BREEDER = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import itertools, pathlib, sys, time\\n"
    "for k in itertools.count(): pathlib.Path(sys.argv[1]).write_text(str(k)); time.sleep(0.02)",
    sys.argv[1]])
for line in sys.stdin:
    print(json.dumps({"ok": True}), flush=True)
"""


def test_what_a_worker_started_pauses_and_ends_with_it(tmp_path):
    """Compilers of a peer that ran into its limit would slow down whoever is measured next."""
    pulse = tmp_path / "pulse"

    def beats(seconds=20.0):
        time.sleep(0.1)  # a signal finds it in the middle of a write
        before, end = pulse.read_text(), time.monotonic() + seconds
        while time.monotonic() < end and pulse.read_text() == before:
            time.sleep(0.02)
        return pulse.read_text() != before

    with Worker([sys.executable, "-c", BREEDER, str(pulse)]) as worker:
        worker.ask("load")
        while not pulse.exists():
            time.sleep(0.02)
        assert beats()
        worker.pause()
        assert not beats(0.5)
        worker.resume()
        assert beats()
    assert not beats(0.5)


def test_a_worker_that_is_not_there():
    with pytest.raises(BackendError, match="cannot be started: No such file") as caught:
        Worker(["/nowhere/python"])
    assert "peers.envs" in caught.value.hint


def test_what_libraries_print_does_not_reach_the_answers():
    with Worker((*FAKE, "noisy")) as worker:
        assert worker.ask("load", options={})["load_s"] == 0.3


def test_an_unknown_question_is_refused():
    with Worker(FAKE) as worker, pytest.raises(BackendError, match="KeyError: 'dance'"):
        worker.ask("dance")


def test_a_paused_worker_answers_when_it_goes_on():
    with Worker(FAKE) as worker:
        worker.pause()
        with pytest.raises(BackendError, match="no answer"):
            worker.ask("load", timeout=0.3, options={})
        worker.resume()
        assert json.loads(worker._answers.get(timeout=20))["ok"]


# --- quality -----------------------------------------------------------------------------------


def measured(psnr_db):
    return Quality(psnr_db, ssim=0.9, ssim_rgb=0.8, gmsd=0.1, max_abs=3.0)


def test_quality_over_pictures_is_median_and_worst():
    found = run.quality_figures([measured(30.0), measured(20.0), measured(None)])
    assert found["psnr_db"] == {"median": 30.0, "worst": 20.0}
    assert (found["pictures"], found["equal"]) == (3, 1)
    assert run.quality_figures([measured(None)])["psnr_db"] == {"median": None, "worst": None}


def test_a_row_whose_reference_failed_says_so(tmp_path):
    row = {"name": "r", "ok": True, "case": {"prompts": ["x"]}}
    failed = {"name": "ref", "ok": False, "failure": {"error": "no memory"}}
    run.judge(row, failed, tmp_path, tmp_path)
    assert row["quality"] is None
    assert row["why"] == "its reference ref failed: no memory"


# --- the whole run -----------------------------------------------------------------------------


def wish(**others):
    given = {"prompts": ("x",), "runs": 2, "overrides": {"steps": 2}}
    return Wish("m", ("a", "gone"), **{**given, **others})


def test_a_whole_run(tmp_path):
    out, told = tmp_path / "new" / "r.json", []
    found = suite.bench(wish(), out, lambda *a: told.append(a), reference="a", command=FAKE)
    assert [row["name"] for row in found.rows] == [
        "picture/a-bf16", "picture/a-f32", "picture/gone"]  # fmt: skip
    assert told[0] == ("picture/a-f32", 0, 3)
    # grey 105 against grey 100: 20 log10(255 / 5)
    assert found.rows[0]["quality"]["psnr_db"]["worst"] == pytest.approx(20 * np.log10(51))
    assert found.rows[1]["quality"]["reference"] == "picture/a-f32"
    assert not found.rows[2]["ok"]
    assert found.rows[0]["disk"]["bundle_bytes"] == 1000
    assert [rate["precision"] for rate in found.rates] == ["f32", "f32"]  # before and after
    assert found.notes == ["no rate in bf16: Refused: no bf16 here"]
    assert found.complete
    assert results.load(out) == found
    assert not list(out.parent.glob(".*")), "nothing is left beside the file"


def test_ctrl_c_leaves_the_rows_that_were_done(tmp_path):
    def interrupt(what, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.bench(wish(), tmp_path / "r.json", interrupt, reference="a", command=FAKE)
    found = results.load(tmp_path / "r.json")
    assert [row["name"] for row in found.rows] == ["picture/a-f32"]
    assert not found.complete


def test_a_model_that_cannot_be_planned_ends_the_run(tmp_path):
    worker = (sys.executable, "-m", "sdengine.bench.worker")
    with pytest.raises(BackendError, match=r"UnknownName.*'emojo'") as caught:
        suite.bench(Wish("emojo", ("openvino",)), tmp_path / "r.json", silent, command=worker)
    assert "emoji" in caught.value.hint


# --- limits ------------------------------------------------------------------------------------


def limited(counter):
    part = {"component": "unet", "what": "run", "dims": {"B": 2}, "seconds": {"median": 0.5}}
    row = {"ok": True, "about": {"precision": "f32"}, "case": {"load": {}}, "components": [part]}
    rates = [{"precision": "f32", "asked": None, "flops": f} for f in (3e9, 4e9)]
    found = results.Results({}, model={"graphs": {"unet": {"full": "g"}}}, rates=rates)
    limits.attach(row, found, counter)
    return part, found


def test_the_share_is_of_the_best_rate():
    """1e9 operations in half a second are 2e9 a second, half of 4e9."""
    part, _ = limited(lambda path, dims: 10**9)
    assert (part["flop"], part["flops"], part["share"]) == (10**9, 2e9, 0.5)


def test_a_graph_that_cannot_be_counted_is_a_note():
    def refuse(path, dims):
        raise BackendError("no shape", hint="report it")

    part, found = limited(refuse)
    assert "share" not in part
    assert found.notes == ["unet: no shape (report it)"]


# --- the results file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "format None, not 1"),
        ('{"format": 2}', "format 2, not 1"),
        ('{"format": 1, "rows": []}', "is not a results file"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        results.load(path)
    assert "sdengine bench --out" in caught.value.hint


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        results.save(results.Results({}), tmp_path / "file" / "r.json")
    assert "--out" in caught.value.hint
