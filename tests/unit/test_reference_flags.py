"""docs/from-the-reference.md, line by line: each command is run on a stand-in for the pipeline (or
for the exporter), and what it was handed is what the page says.

The list of flags and controls is the reference's own: the argument parsers and the widgets of its
scripts.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdengine import api, cli, export
from sdengine.engine.request import Request

PAGE = Path(__file__).parents[2] / "docs" / "from-the-reference.md"
PARSERS = {
    "txt2img.py": (
        "--prompt --outdir --steps --plms --dpm --fixed_code --ddim_eta --n_iter --H --W --C --f"
        " --n_samples --n_rows --scale --from-file --config --ckpt --seed --precision --repeat"
        " --device --torchscript --ipex --bf16"
    ),
    "img2img.py": (
        "--prompt --init-img --outdir --ddim_steps --fixed_code --ddim_eta --n_iter --C --f"
        " --n_samples --n_rows --scale --strength --from-file --config --ckpt --seed --precision"
    ),
}
WIDGETS = {
    "inpainting.py": ["mask", "prompt", "Images", "Steps", "Guidance Scale", "Seed", "checkpoint"],
    "depth2img.py": [
        "picture", "Images", "Steps", "Guidance Scale", "Strength", "Seed", "eta (DDIM)",
    ],
    "superresolution.py": [
        "Prompt", "Number of Samples", "DDIM Steps", "Scale", "Seed", "eta (DDIM)",
        "Noise Augmentation",
    ],
    "stableunclip.py": [
        "Model Version", "Use KARLO prior", "Prompt", "Negative Prompt", "cfg-scale", "num rows",
        "num cols", "steps", "eta (DDIM)", "Force FP32", "H, W", "seed", "Sampler DDIM",
        "Sampler DPM", "Noise Augmentation", "Input", "Weight",
    ],
}  # fmt: skip


def sections() -> dict[str, list[list[str]]]:
    """Script -> rows of its table, four cells each."""
    found: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            script = line.removeprefix("## ").split(" ")[0]
            found[script] = []
        elif line.startswith("| ") and not line.startswith("| reference |"):
            found[script].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


SECTIONS = sections()
TASKS = {
    "txt2img.py": "txt2img", "img2img.py": "img2img", "inpainting.py": "inpaint",
    "depth2img.py": "depth2img", "superresolution.py": "upscale", "stableunclip.py": "unclip",
}  # fmt: skip
LINES = [
    pytest.param(TASKS[script], *row[1:3], id=f"{script} {row[0]}: {row[1]}")
    for script, rows in SECTIONS.items()
    for row in rows
]
FIELDS = {f.name for f in dataclasses.fields(Request)}


def stub():
    path = Path(__file__).parents[1] / "cli" / "stub.py"
    spec = importlib.util.spec_from_file_location("stub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Seen:
    """What reached the pipeline's opening, the pipeline, the exporter and stdout."""

    def __init__(self, monkeypatch, task):
        module = stub()
        self.load = module.StubLoad()
        self.exported = {}
        own = Request.completed  # the stub's own task is txt2img
        monkeypatch.setattr(Request, "completed", lambda r, _, size: own(r, task, size))
        monkeypatch.setattr(api, "load", self.load)
        monkeypatch.setattr(export, "open_checkpoint", self.open_checkpoint)
        monkeypatch.setattr(export, "export_bundle", self.export_bundle)
        self.task = task

    def open_checkpoint(self, path, *, progress, **options):
        self.exported |= {"checkpoint": str(path)} | {k: str(v) for k, v in options.items()}

    def export_bundle(self, _, out, *, progress, **options):
        self.exported["out"] = str(out)
        return out

    def value(self, name, stdout):
        requests = self.load.pipeline.requests
        if name == "files":
            return stdout.split()
        if name == "prompts":
            return [request.prompt for request in requests]
        if name in FIELDS:
            return getattr(requests[-1].completed(self.task, (64, 64)), name)
        if name in ("image", "mask", "depth"):
            return self.load.pipeline.pictures[name]
        return self.exported[name] if self.exported else self.load.calls[-1][name]


def code(cell):
    assert cell.startswith("`"), cell
    assert cell.endswith("`"), cell
    return cell.strip("`")


def wanted(cell):
    """`steps=30, sampler='ddim'` as a dictionary."""
    call = ast.parse(f"f({code(cell)})", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize(("task", "command", "has"), LINES)
def test_a_line_of_the_page(monkeypatch, tmp_path, task, command, has):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox\n\na dog\n")
    seen = Seen(monkeypatch, task)
    result = CliRunner().invoke(cli.app, shlex.split(code(command)))
    expected = wanted(has)
    assert expected
    if "refused" in expected:
        assert result.exit_code == 2
        assert expected["refused"] in result.stderr
        assert seen.load.calls == []
        return
    assert result.exit_code == 0, result.stderr
    assert {name: seen.value(name, result.stdout) for name in expected} == expected


@pytest.mark.parametrize("script", PARSERS)
def test_no_flag_is_left_out(script):
    named = " ".join(row[0] for row in SECTIONS[script]).replace("`", " ").replace(",", " ").split()
    assert set(PARSERS[script].split()) - set(named) == set()


@pytest.mark.parametrize("script", WIDGETS)
def test_no_control_is_left_out(script):
    named = " | ".join(row[0] for row in SECTIONS[script])
    assert [control for control in WIDGETS[script] if control not in named] == []


def test_every_line_was_read():
    """No line of a table is passed over, and each says all that it must."""
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [row for rows in SECTIONS.values() for row in rows]
    assert len(lines) == len(rows) + 2 * len(SECTIONS)
    assert set(SECTIONS) == set(PARSERS) | set(WIDGETS)
    assert all(len(row) == 4 for row in rows)
