"""`sdengine bench` from the outside: what is on stdout, on stderr, in the file, and the status."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdengine.bench import interleave, ladder, results, suite
from sdengine.bench.command import app
from sdengine.bench.ladder import Rung
from sdengine.bench.peers import catalogue
from sdengine.engine.errors import RequestError

FAKE = (sys.executable, str(Path(__file__).parents[1] / "fake_worker.py"))
ROWS = ("--backends", "a,gone", "--steps", "2", "--runs", "2")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`bench(*arguments)` on workers with known answers, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for module, name in ((suite, "bench"), (ladder, "climb")):
        known = functools.partial(getattr(module, name), command=FAKE)
        monkeypatch.setattr(
            module, name, lambda *a, _known=known, **k: _known(*a, **{**k, "reference": "a"})
        )

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return invoke


def test_a_run_prints_its_table_and_writes_its_file(bench, tmp_path):
    done = bench(*ROWS, "--out", "r.json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("| row | picture |")
    assert "| picture/gone | failed: its package is not installed |" in done.stdout
    assert "0 of 3 done; now picture/a-f32" in done.stderr
    assert "written to r.json" in done.stderr
    assert len(results.load(tmp_path / "r.json").rows) == 3


def test_json_is_the_whole_truth_in_one_line(bench, tmp_path):
    done = bench(*ROWS, "--json", "--quiet", "--precision", "f32", "--threads", "1,2")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in found["rows"]][:2] == ["picture/a-f32-t1", "picture/a-f32-t2"]
    assert "done; now" not in done.stderr


def test_options_become_fields_of_the_request(bench):
    prompts = Path("prompts.txt")
    prompts.write_text("one\n\ntwo\n")
    more = ("--size", "96x64", "--guidance", "1", "--batch", "2", "--sampler", "ddim")
    done = bench(*ROWS, *more, "--cases", "short", "--prompts", prompts, "--json")
    case = json.loads(done.stdout)["rows"][0]["case"]
    request = dict(case["request"])
    request.pop("seed")
    assert request == {"steps": 2, "guidance": 1.0, "count": 2, "batch_size": 2,
                       "sampler": "ddim", "width": 96, "height": 64}  # fmt: skip
    assert case["prompts"] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("--size", "512"), "--size is '512'", "--size 768x512"),
        (("--threads", "two"), "--threads is 'two'", "--threads 1,2"),
        (("--cases", "pictures"), "unknown case 'pictures'", "did you mean 'picture'"),
        (("--steps", "0"), "steps is 0", "a value in that range"),
        (("--sampler", "dimm"), "unknown sampler 'dimm'", "'ddim'"),
        (("--prompts", "nowhere.txt"), "cannot be read", "a prompt a line"),
        (("--prompts", "empty.txt"), "holds no prompt", "write a prompt"),
        (("report", "nowhere.json"), "cannot be read", "sdengine bench --out"),
        (("report", "r.json", "--out", "x.pdf"), "is no kind of report", ".md, .csv, .html"),
        (("renew", "nowhere.md"), "nowhere.md cannot be read", "name a Markdown"),
        (("ladder", "--rungs", "empty.txt"), "no rungs in", '"changed"'),
        (("peers", ".", "--against", "genay"), "unknown peer 'genay'", "'genai'"),
        (("peers", ".", "--turns", "genai"), "--turns holds 'genai'", "--turns genai=2"),
        (("peers", ".", "--fewer", "exact=2"), "unknown name in --fewer 'exact'", "known: diff"),
    ],
)
def test_a_wrong_wish_ends_with_status_2_and_a_hint(bench, arguments, error, hint):
    Path("empty.txt").write_text("")
    Path("r.json").write_text('{"format": 1, "conditions": {}}')
    done = bench(*arguments)
    assert done.exit_code == 2, done.output
    assert f"error: {error}" in done.stderr or error in done.stderr
    assert hint in done.stderr.partition("hint: ")[2]
    assert done.stdout == ""


def test_ctrl_c_ends_with_130(bench, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "bench", interrupted)
    done = bench()
    assert done.exit_code == 130
    assert "holds the rows that were done" in done.stderr


# --- compare -----------------------------------------------------------------------------------


@pytest.fixture
def pair(bench):
    """Two result files; all times of the second are twice those of the first."""
    bench(*ROWS, "--out", "a.json")
    found = results.load(Path("a.json"))
    for row in found.rows:
        for summary in row["steady"].values() if row["ok"] else ():
            summary["samples"] = [2 * t for t in summary["samples"]]
    found.conditions["python"] = "3.99"
    results.save(found, Path("b.json"))
    return bench


def test_compare_prints_ratios_and_other_conditions(pair):
    done = pair("compare", "a.json", "b.json")
    assert done.exit_code == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "a-f32   total_s" in line)
    assert line.split()[2:9] == ["2", "s", "2", "s", "2.000", "(2.000", "to"]
    assert "warning: other conditions: python:" in done.stderr
    assert json.loads(pair("compare", "a.json", "b.json", "--json").stdout)["failed"] == []


def test_the_gate_ends_with_status_1_and_says_which_row(pair):
    done = pair("compare", "a.json", "b.json", "--max-slowdown", "1.05")
    assert done.exit_code == 1
    assert "too slow: picture/a-f32 total_s: 2.000 (2.000 to 2.000) times as long" in done.stderr
    assert pair("compare", "a.json", "b.json", "--max-slowdown", "2.1").exit_code == 0
    assert pair("compare", "b.json", "a.json", "--max-slowdown", "1.05").exit_code == 0


# --- reports -----------------------------------------------------------------------------------


def test_report_makes_what_its_suffix_says(pair):
    assert pair("report", "a.json").stdout.startswith("| row |")
    for name, begin in (("x.md", "| row |"), ("x.csv", "row,ok,"), ("x.html", "<!doctype html>")):
        assert pair("report", "a.json", "--out", name).stdout == f"{name}\n"
        assert Path(name).read_text().startswith(begin)


def test_renew_changes_the_document(pair):
    Path("doc.md").write_text("<!-- bench: a.json --><!-- /bench -->\n")
    done = pair("renew", "doc.md", "--results", ".")
    assert done.stdout == "doc.md\n", done.stderr
    assert "| picture/a-f32 |" in Path("doc.md").read_text()


# --- ladder and peers --------------------------------------------------------------------------


def test_a_ladder_keeps_its_order_and_its_failed_rungs(bench, tmp_path):
    loads = {"slow": {"backend": "b", "seconds": 8}, "lost": {"backend": "gone"},
             "fast": {"backend": "b", "seconds": 1}}  # fmt: skip
    rungs = [{"name": n, "changed": f"to {n}", "load": load} for n, load in loads.items()]
    Path("rungs.json").write_text(json.dumps(rungs))
    done = bench("ladder", "--rungs", "rungs.json", "--steps", "2", "--runs", "2")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["slow", "lost", "fast"]
    assert "failed: its package is not installed" in lines[3]
    assert "| 8.00 (8.00 to 8.00) |" in lines[4]
    assert results.load(tmp_path / "ladder.json").row("rung/fast")["changed"] == "to fast"


def test_rungs_need_names_of_their_own(tmp_path):
    path = tmp_path / "rungs.json"
    path.write_text('[{"name": "a", "changed": ""}, {"name": "a", "changed": ""}]')
    with pytest.raises(RequestError, match="2 rungs") as caught:
        ladder.read(path)
    assert "a name of its own" in caught.value.hint


def test_the_ladder_begins_with_eager_float32():
    assert ladder.RUNGS[0] == Rung(
        "eager", ladder.RUNGS[0].changed, {"backend": "torch", "precision": "f32"}
    )
    assert len({rung.name for rung in ladder.RUNGS}) == len(ladder.RUNGS)


def test_peers_that_are_not_there_are_rows(bench, monkeypatch):
    """Our own side too: nothing is started here."""
    absent = catalogue.Peer("nothing", "absent", "x.py", "form")
    monkeypatch.setattr(catalogue, "OURS", {"f32": absent, "exact": absent})
    done = bench("peers", "home", "--against", "genai,sdcpp-q8_0", "--size", "64x64")
    assert done.exit_code == 0, done.stderr
    assert "| genai | sdengine exact | failed: its environment genai is not there |" in done.stdout
    found = results.load(Path("peers.json"))
    assert (found.complete, len(found.ratios)) == (True, 2)
    assert "steps 20" in found.notes[0]


def test_interleave_says_which_names_it_knows():
    assert set(catalogue.OURS) >= {"exact", "high", "balanced"}
    assert interleave.setup("emoji", Path(), ["exact"], ["genai"], 2).threads == 2


# --- the real thing, small ---------------------------------------------------------------------


@pytest.mark.ov
@pytest.mark.ort
def test_the_embedded_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app,
        ["--backends", "onnxruntime", "--reference", "onnxruntime", "--steps", "2", "--runs", "1",
         "--threads", "1", "--no-warm-start", "--size", "64x64", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert row["name"] == "picture/onnxruntime-f32-t1"
    assert row["quality"]["equal"] == 4, "it is its own reference, over four prompts"
    unet = next(p for p in row["components"] if (p["component"], p["what"]) == ("unet", "run"))
    # guided: both halves in one call, 64 / 8 cells a side, one call a step
    assert (unet["dims"], unet["calls"]) == ({"B": 2, "T": 77, "h": 8, "w": 8}, 2)
    assert 0 < unet["share"] < 1.5, "of the rate of matrix products, measured beside it"
    start = row["cold_start"]
    assert start["import_s"] < start["to_first_step_s"] < start["to_first_picture_s"]
    assert row["memory"]["loaded_bytes"] < row["memory"]["peak_bytes"]
    assert found["model"]["native_size"] == [128, 128]


def commands() -> list[bytes]:
    """The command lines of all processes; one that ends meanwhile has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_run_that_is_ended_in_the_middle_of_a_row(tmp_path, sent, status):
    """While a worker never answers: the file is valid, the worker is gone, nothing is left."""
    script, scratch = tmp_path / "run.py", tmp_path / "scratch"
    scratch.mkdir()
    script.write_text(
        "import functools, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sdengine.bench import suite\n"
        "from sdengine.bench.command import app\n"
        f"worker = {(*FAKE, 'hang', str(tmp_path))!r}\n"
        "suite.bench = functools.partial(suite.bench, command=worker)\n"
        "app(args=sys.argv[1:], prog_name='bench')\n"
    )
    command = [sys.executable, str(script), "--backends", "a", "--out", "r.json"]
    env = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if "done; now" in line:
                break
        time.sleep(0.5)
        assert any(bytes(tmp_path) in c and b"hang" in c for c in commands())
        process.send_signal(sent)
        said = process.stderr.read()
    assert process.returncode == status, said
    found = results.load(tmp_path / "r.json")
    assert (found.rows, found.complete) == ([], False)
    assert not any(bytes(tmp_path) in c for c in commands())
    assert list(scratch.iterdir()) == []
