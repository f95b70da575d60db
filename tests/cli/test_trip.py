"""A random checkpoint, exported; then the command line on the bundle, with the default engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdengine import cli

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.slow]


def test_a_bundle_is_inspected_and_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "cache"))
    shown = CliRunner().invoke(cli.app, ["inspect", str(tiny_bundle), "--verify", "--json"])
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert set(facts["components"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert "prologue" in facts["components"]["unet"]["graphs"]
    assert "f32" in facts["targets"]["openvino"]["precisions"]
    assert {r["component"] for r in facts["parity"]} == set(facts["components"])
    text = CliRunner().invoke(cli.app, ["inspect", str(tiny_bundle)]).stdout
    assert facts["id"] in text
    options = ["--backend", "openvino", "--precision", "f32", "--steps", "2", "--seed", "7"]
    size = ["--width", "64", "--height", "128"]
    ran = CliRunner().invoke(
        cli.app,
        ["run", "--model", str(tiny_bundle), "--prompt", "a fox", *options, *size, "--json"],
    )
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["about"]["bundle"] == facts["id"]
    assert (tmp_path / "a-fox.7.png").is_file()
    assert "backend openvino, precision f32" in ran.stderr
