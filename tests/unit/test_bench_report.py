"""Tables, the page, comparisons and the gate, made from results written by hand."""

from __future__ import annotations

import copy
import csv
import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from sdengine.bench import compare, ladder, report, results, stats
from sdengine.bench.page import page, plots
from sdengine.bench.results import Results
from sdengine.engine.errors import RequestError

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results"
DOCUMENTS = [p for p in (ROOT / "README.md", COMMITTED / "README.md")
             if p.exists() and "<!-- bench: " in p.read_text(encoding="utf-8")]  # fmt: skip


def row(name, seconds, quality=None, **others):
    steady = {s: stats.summary([t / 4 for t in seconds])
              for s in ("text_s", "denoise_s", "decode_s", "own_s")}  # fmt: skip
    steady |= {"total_s": stats.summary(seconds), "step_s": stats.summary([t / 8 for t in seconds])}
    start = {"import_s": 0.1, "load_s": 0.2, "build_s": 0.3, "to_first_step_s": 1.0,
             "to_first_picture_s": 1.25}  # fmt: skip
    unet = {"component": "unet", "what": "run", "dims": {"B": 2, "h": 16}, "calls": 25.0,
            "seconds": stats.summary([t / 8 for t in seconds]), "flop": 1_620_000_000,
            "flops": 9.8125e10, "share": 0.625}  # fmt: skip
    prologue = {"component": "unet", "what": "bind", "dims": {"B": 2}, "calls": 1.0,
                "seconds": stats.summary([0.003])}  # fmt: skip
    return {
        "name": name, "ok": True, "about": {"precision": "f32"},
        "case": {"load": {"backend": "openvino", "precision": "f32"}, "warmups": 1,
                 "prompts": ["x"]},
        "steady": steady, "cold_start": start, "components": [unet, prologue],
        "memory": {"peak_bytes": 1_500_000_000}, "quality": quality, **others,
    }  # fmt: skip


def judged(middle, worst, reference="ref"):
    return {"reference": reference, "psnr_db": {"median": middle, "worst": worst},
            "ssim": {"median": 0.99, "worst": 0.9}}  # fmt: skip


def failed(name, error="no memory"):
    failure = {"stage": "load", "error": error, "hint": "take less"}
    return {"name": name, "ok": False, "case": {"load": {"backend": "torch"}}, "failure": failure}


def conditions():
    return {
        "time": "2026-11-23T11:00:00+00:00",
        "processor": {"name": "AMD EPYC avx avx2", "visible": 2, "quota": 1.5, "threads": 2,
                      "governor": "performance"},
        "memory": {"total": 24_000_000_000, "available": 1, "limit": None},
        "system": {"name": "Linux", "kernel": "6.1", "distribution": "Debian 12"},
        "load": 0.5, "python": "3.11.7", "packages": {"openvino": "2026.4.1"},
        "settings": {"OMP_NUM_THREADS": "1"},
        "sdengine": {"version": "0.1.0", "commit": "abcdef0123456789", "dirty": True},
    }  # fmt: skip


@pytest.fixture
def run():
    model = {"name": "emoji", "variant": "base", "native_size": [128, 128], "bytes": 33_000_000,
             "sha256": "f" * 64, "graphs": {}}  # fmt: skip
    rate = {"precision": "f32", "threads": 2, "flops": 157e9, "ran_in": "f32", "side": 2048,
            "engine": "OpenVINO 2026.4.1"}  # fmt: skip
    rows = [
        row("ref", [2.0, 2.2, 2.4], judged(None, None)),
        row("fast|er", [0.5, 0.5, 0.6], judged(33.25, 24.0)),
        failed("broken"),
    ]
    return Results(conditions(), model, [rate, {**rate, "flops": 150e9}], rows, complete=True)


# --- Markdown and CSV --------------------------------------------------------------------------


def test_the_table_holds_every_row_with_speed_and_quality(run):
    lines = report.markdown(run).splitlines()
    assert lines[2] == ("| ref | 2.2 s (2.04 s to 2.36 s) | 275 ms (255 ms to 295 ms) | 62% | "
                        "1.25 s |  | 1.5 GB | the reference |")  # fmt: skip
    assert lines[3].startswith("| fast\\|er | 500 ms")
    assert lines[3].endswith("| 33.2 dB, 0.990 (24.0 dB, 0.900) |")
    assert lines[4].startswith("| broken | failed: no memory |")
    assert "- broken, at load: no memory (take less)" in lines


def test_every_network_stands_with_its_distance_from_the_limit(run):
    """1.62e9 operations, 98e9 a second, and nothing invented where they were not counted."""
    lines = report.markdown(run).splitlines()
    assert "| ref | unet | B2 h16 | 25 | 275 ms (255 ms to 295 ms) | 1.62 | 98.1 | 62% |" in lines
    assert "| ref | unet, once | B2 | 1 | 3 ms (3 ms to 3 ms) |  |  |  |" in lines
    assert not any(line.startswith("| broken | unet") for line in lines)


def test_the_conditions_stand_under_it(run):
    text = report.markdown(run)
    for part in ("AMD EPYC, 2 processors visible, 2 threads, quota 1.5, governor performance",
                 "24 GB memory", "Debian 12, kernel 6.1", "openvino 2026.4.1, OMP_NUM_THREADS=1",
                 "sdengine 0.1.0 at abcdef0123 with changes", "sha256 ffffffffffffffff",
                 "157 GFLOP/s in f32"):  # fmt: skip
        assert part in text
    assert "150 GFLOP/s" not in text, "the better of two measurements is the machine's"
    run.complete = False
    assert "was ended before" in report.markdown(run)


def test_quality_in_words(run):
    assert report.quality(row("a", [1.0], judged(None, None))) == "equal to the reference"
    assert report.quality(row("a", [1.0], judged(None, 40.0))).startswith("equal, 0.990 (40.0 dB")
    assert report.quality(row("a", [1.0], None)) == "not measured"
    assert report.quality(row("a", [1.0], None, why="its reference failed")) == (
        "its reference failed"
    )
    assert report.quality(row("a", [1.0], judged(None, None, "a"))) == "the reference"


def test_csv_has_a_line_a_row_and_as_many_cells_as_names(run):
    head, *lines = csv.reader(io.StringIO(report.as_csv(run)))
    assert {len(line) for line in lines} == {len(head)}
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert float(found[1]["total_s_median"]) == 0.5
    assert found[1]["psnr_db_worst"] == "24.0"
    assert found[0]["psnr_db_median"] == ""
    assert (found[2]["ok"], found[2]["failure"]) == ("False", "no memory")


# --- the page ----------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_else(run):
    run.rows[1]["name"] = "<script>"
    text = page(run)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not any(word in text for word in ("src=", "href=", "@import", "url("))
    assert "failed: no memory" in text


def test_every_plot_is_drawn_to_scale(run):
    drawn = dict(plots([r for r in run.rows if r["ok"]]))
    assert len(drawn) == 4
    for svg in drawn.values():
        ElementTree.fromstring(svg)
    bars = ElementTree.fromstring(drawn["Seconds of a picture: median, and p10 to p90"])
    widths = [float(e.get("width")) for e in bars if e.tag.endswith("rect")]
    assert widths[0] / widths[1] == pytest.approx(2.2 / 0.5, rel=0.01)


def test_a_run_without_any_row_that_worked_is_still_a_page(run):
    run.rows = [failed("broken")]
    assert "failed: no memory" in page(run)
    assert list(plots([])) == []


# --- interleaved runs --------------------------------------------------------------------------


def pair(**others):
    summary = stats.summary([2.0, 2.1])
    return {"peer": "genai", "ours": "sdengine exact", "ok": True,
            "seconds": {"peer": summary, "ours": stats.summary([1.0, 1.1])},
            "ratio": {"median": 1.95, "low": 1.9, "high": 2.0},
            "settings": "its default", "our_settings": "bfloat16",
            "quality": {"peer": {"psnr_db": 21.04}, "ours": {"psnr_db": None}},
            "peak_bytes": {"peer": 5_600_000_000, "ours": None}, **others}  # fmt: skip


def test_ratios_stand_in_the_table_and_on_the_page(run):
    failure = {"stage": "load", "error": "no compiler", "hint": ""}
    broken = pair(peer="sdcpp", ok=False, failure=failure, settings="eight bits")
    run.ratios = [pair(), broken]
    text = report.markdown(run)
    assert "| 1.95 (1.90 to 2.00) | 5.6 GB, ? | 21.0 dB, equal |" in text
    assert "| sdcpp | sdengine exact | failed: no compiler |" in text
    assert [line for line in text.splitlines() if line.startswith("- ")][-3:] == [
        "- genai: its default", "- sdcpp: eight bits", "- sdengine exact: bfloat16"]  # fmt: skip
    for word in ("Times as long as ours", "21.0 dB, equal", "failed: no compiler", "eight bits"):
        assert word in page(run)
    run.ratios = [broken]
    assert "failed: no compiler" in page(run)
    run.ratios = [pair(quality={"peer": None, "ours": None})]
    assert "| ?, ? |" in report.markdown(run)


def test_a_document_takes_the_ratios_with_their_notes(run, tmp_path):
    run.rows, run.ratios, run.notes = [], [pair(composed_of=2)], ["in turn, 2 rounds"]
    results.save(run, tmp_path / "r.json")
    begin, end = "<!-- bench: r.json -->", "<!-- /bench -->"
    lines = report.renew(f"{begin}\n{end}", tmp_path, results.load).splitlines()
    assert lines[1].startswith("| peer | ours |"), "no empty table of rows before it"
    assert "| 2.05 s (2.01 s to 2.09 s), composed of 2 steps | 1.05 s" in lines[3]
    assert "- genai: its default" in lines
    assert lines[-2] == "Note: in turn, 2 rounds."
    assert any(line.startswith("Conditions: AMD EPYC") for line in lines)


# --- comparing ---------------------------------------------------------------------------------


def test_a_comparison_of_a_run_with_one_twice_as_slow(run):
    slow = copy.deepcopy(run)
    for found in slow.rows[:2]:
        for metric, summary in found["steady"].items():
            found["steady"][metric] = stats.summary([2 * t for t in summary["samples"]])
    slow.conditions["processor"]["threads"] = 4
    found = compare.compare(run, slow)
    assert {round(c.ratio.median, 6) for c in found.changes} == {2.0}
    assert found.conditions == ["processor.threads: 2, then 4"]
    assert found.only == {"broken": "failed in the first run: no memory"}
    assert len(compare.gate(found, run, 1.05)) == 4
    assert compare.gate(found, run, 2.5) == []
    assert compare.gate(compare.compare(slow, run), slow, 1.05) == []
    table = list(compare.lines(found))
    assert "2.000 (" in table[1]
    assert "33.2 -> 33.2" in table[3]
    assert table[-1] == "broken: failed in the first run: no memory"


def test_noise_alone_does_not_fail_the_gate(run):
    """6 % slower in the middle, but anywhere from faster to slower."""
    first, second = row("a", [1.0, 1.5, 0.8]), row("a", [1.06, 0.7, 1.6])
    found = compare.compare(
        Results(conditions(), rows=[first]), Results(conditions(), rows=[second])
    )
    assert found.changes[0].ratio.median > 1.05
    assert compare.gate(found, Results({}, rows=[first]), 1.05) == []


def test_a_row_that_is_gone_fails_the_gate(run):
    less = copy.deepcopy(run)
    less.rows[1] = failed("fast|er", "crashed")
    (failure,) = compare.gate(compare.compare(run, less), run, 1.05)
    assert failure == "fast|er: failed in the second run: crashed"


def test_runs_without_a_common_row_cannot_be_compared(run):
    with pytest.raises(RequestError, match="no row in common") as caught:
        compare.compare(run, Results(conditions(), rows=[failed("x")]))
    assert "the second none that ran" in caught.value.hint


# --- the ladder --------------------------------------------------------------------------------


def test_each_rung_stands_against_the_one_before_and_the_first(run):
    rungs = [row("rung/eager", [8.0] * 3, judged(80.0, 79.0), changed="the yardstick"),
             {**failed("rung/int8", "not in this bundle"), "changed": "int8"},
             row("rung/graph", [4.0] * 3, judged(80.0, 79.0), changed="a graph"),
             row("rung/bf16", [1.0] * 3, judged(33.0, 30.0), changed="bfloat16")]  # fmt: skip
    lines = ladder.markdown(Results(conditions(), rows=[row("a/ref", [9.0]), *rungs])).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["eager", "int8", "graph", "bf16"]
    assert "failed: not in this bundle" in lines[3]
    assert "| 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in lines[4]
    assert "| 4.00 (4.00 to 4.00) | 8.00 (8.00 to 8.00) |" in lines[5]


# --- documents ---------------------------------------------------------------------------------


def test_renewing_replaces_what_stands_between_the_marks(run, tmp_path):
    results.save(run, tmp_path / "r.json")
    begin, end = "<!-- bench: r.json -->", "<!-- /bench -->"
    text = f"before\n{begin}\nstale\n{end}\nafter {begin}x{end}"
    new = report.renew(text, tmp_path, results.load)
    assert "stale" not in new
    assert new.startswith(f"before\n{begin}\n| row |")
    assert f"\n{end}\nafter <!--" in new
    assert report.renew(new, tmp_path, results.load) == new


def test_a_mark_without_its_end_is_refused(tmp_path):
    with pytest.raises(RequestError, match="has no end") as caught:
        report.renew("<!-- bench: r.json -->\ntable", tmp_path, results.load)
    assert "<!-- /bench -->" in caught.value.hint


def test_documents_that_show_results_are_found():
    assert COMMITTED / "README.md" in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_committed_tables_are_current(document):
    text = document.read_text(encoding="utf-8")
    assert report.renew(text, COMMITTED, results.load) == text, (
        f"run: sdengine bench renew {document.relative_to(ROOT)}"
    )
