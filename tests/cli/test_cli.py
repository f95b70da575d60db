"""The command line, inside this process: what it parses, calls and prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from sdengine import api, cli
from sdengine.engine.request import DEFAULTS, Request

Run = Callable[..., Any]


def sibling(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = sibling("stub", Path(__file__).parent)
tiny = sibling("tiny_bundle", Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with a cache beside it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = stub.StubLoad()
    monkeypatch.setattr(api, "load", stand_in)
    return stand_in


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny.write(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def failed(status: int, *arguments: object) -> str:
    """It ends with this status, says nothing on stdout, and no traceback; what it says is given."""
    result = run(*arguments)
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)


def with_hint(message: str, text: str) -> str:
    """`error: ...`, an empty line, `hint: ...`; the hint is given."""
    error, empty, hint = text.splitlines()[-3:]
    assert error.startswith("error: ")
    assert message in error
    assert empty == ""
    assert hint.startswith("hint: ")
    return hint


# run


def test_stdout_is_the_path_and_nothing_else(load: Any, place: Path) -> None:
    result = run("run", "--prompt", "A slice of pizza!", "--seed", 7, "--steps", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "a-slice-of-pizza.7.png\n"
    with Image.open(place / "a-slice-of-pizza.7.png") as image:
        assert image.size == (64, 64)
        assert "Seed: 7" in image.info["parameters"]
    assert "denoise 3 x 14 ms" in result.stderr
    assert "fake f32" in result.stderr
    assert "exporting unet" in result.stderr
    assert "\x1b" not in result.stderr
    assert load.pipeline.closed


def test_quiet_says_nothing(load: Any) -> None:
    result = run("run", "--prompt", "x", "--seed", 1, "-q")
    assert (result.stdout, result.stderr) == ("x.1.png\n", "")


def test_json_is_one_line(load: Any, place: Path) -> None:
    result = run("run", "--prompt", "fox", "--seed", 7, "--count", 2, "--json")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["pictures"] == [{"path": f"fox.{s}.png", "seed": s} for s in (7, 8)]
    assert found["request"]["prompt"] == "fox"
    assert found["about"]["backend"] == "fake"
    assert found["timings"]["total"] == 0.5
    assert found["warnings"] == []
    assert sorted(os.listdir(place)) == ["fox.7.png", "fox.8.png"]


def test_every_option_reaches_the_request(load: Any) -> None:
    asked = {
        "prompt": "a fox",
        "negative_prompt": "a dog",
        "width": 128,
        "height": 192,
        "steps": 4,
        "guidance": 0.0,
        "sampler": "ddim",
        "schedule": "trailing",
        "eta": 0.5,
        "seed": 0,
        "count": 2,
        "batch_size": 2,
        "task": "txt2img",
        "noise": "numpy",
        "resize": "fill",
        "background": "teal",
        "mask_blur": 3.0,
        "thin_mask": "max",
        "safety": "mark",
        "compat": "reference",
        "s_noise": 1.01,
        "preset": "fast",
        "cache": 3,
        "cut": 1,
        "rescale": 0.5,
        "cfg_plus_plus": 0.25,
        "tile": 64,
        "solver": "s.json",
        "halves": "apart",
        "variation_seed": 4,
        "variation_strength": 0.25,
    }
    spelled = {
        "invert_mask": True, "paste": False, "watermark": False, "zero_snr": True,
        "prompt_weights": True, "long_prompt": True, "guidance_interval": (0.5, 6.0),
    }  # fmt: skip
    unused = {"strength": 0.5, "noise_level": 7, "weights": (0.5, 2.0)}
    listed = {
        "sigmas": (9.0, 0.5, 0.0), "timesteps": (999.0, 1.5), "guidance_scales": (1.0, 3.0),
    }  # fmt: skip
    known = {f.name for f in dataclasses.fields(Request)}
    assert set(asked) | set(spelled) | set(unused) | set(listed) == known
    options = [x for k, v in asked.items() for x in (f"--{k.replace('_', '-')}", v)]
    flags = ["--invert-mask", "--no-paste", "--no-watermark", "--zero-snr", "--prompt-weights"]
    result = run("run", *options, *flags, "--long-prompt", "--guidance-interval", "0.5,6")
    assert result.exit_code == 0, result.stderr
    assert load.pipeline.requests == [Request(**asked, **spelled)]
    other = ["--strength", 0.5, "--noise-level", 7, "--weight", 0.5, "--weight", 2]
    assert run("run", *other).exit_code == 2  # the stub's task is txt2img
    assert load.pipeline.requests[1:] == [Request(**unused)]
    for name, values in listed.items():
        text = ",".join(map(str, values))
        assert run("run", f"--{name.replace('_', '-')}", text).exit_code == 0
        assert getattr(load.pipeline.requests[-1], name) == values
    wrong = run("run", "--sigmas", "9;0")
    assert wrong.exit_code == 2
    assert "commas between: --sigmas" in wrong.stderr


def test_pictures_reach_the_pipeline_in_their_order(load: Any) -> None:
    given = ["--image", "b.png", "--image", "a.png", "--mask", "m.png", "--depth", "d.png"]
    assert run("run", *given).exit_code == 0
    assert load.pipeline.pictures == {
        "image": ["b.png", "a.png"], "mask": "m.png", "depth": "d.png",
    }  # fmt: skip


def test_every_option_reaches_load(load: Any) -> None:
    given = ["--model", "m", "--backend", "openvino", "--precision", "bf16", "--threads", 2]
    assert run("run", *given).exit_code == 0
    assert load.calls == [{"model": "m", "backend": "openvino", "precision": "bf16", "threads": 2}]


def test_the_choices_of_the_plan_reach_load(load: Any) -> None:
    given = ["--cores", "all", "--numa-node", "1", "--no-pin", "--hyper-threads"]
    given += ["--device", "GPU", "--low-memory", "--while-building", "torch"]
    assert run("run", *given).exit_code == 0
    assert load.calls == [
        {
            "cores": "all",
            "numa_node": "1",
            "pin": False,
            "hyper_threads": True,
            "device": "GPU",
            "while_building": "torch",
            "low_memory": True,
        }
    ]


def test_what_is_not_given_is_left_to_the_engine(load: Any) -> None:
    assert run("run").exit_code == 0
    assert load.calls == [{}]
    assert load.pipeline.requests == [Request()]


def test_the_command_line_holds_no_default() -> None:
    command: Any = typer.main.get_command(cli.app)
    for parameter in command.commands["run"].params:
        assert parameter.default in (None, False), parameter.name


def test_help_names_the_engines_defaults() -> None:
    text = " ".join(run("run", "--help").stdout.split())
    assert f"default {DEFAULTS['txt2img']['steps']}" in text
    assert f"default 7.5, upscale {DEFAULTS['upscale']['guidance']}" in text
    assert "img2img" in text
    assert "ddim" in text
    assert "bf16" in text


def test_a_name_is_never_given_twice(load: Any, place: Path) -> None:
    names = [run("run", "-p", "fox", "--seed", 7).stdout.strip() for _ in range(3)]
    assert names == ["fox.7.png", "fox.7-2.png", "fox.7-3.png"]


@pytest.mark.parametrize(
    ("out", "count", "expected"),
    [
        ("x.png", 1, ["x.png"]),
        ("x.webp", 2, ["x.7.webp", "x.8.webp"]),
        ("new/folder", 2, ["new/folder/fox.7.png", "new/folder/fox.8.png"]),
        ("new/v2.1/", 1, ["new/v2.1/fox.7.png"]),
        ("new/x.jpg", 1, ["new/x.jpg"]),
    ],
)
def test_out_is_a_file_or_a_folder(
    load: Any, place: Path, out: str, count: int, expected: list[str]
) -> None:
    result = run("run", "-p", "fox", "--seed", 7, "--out", out, "--count", count)
    assert result.stdout.split() == expected
    for name in expected:
        with Image.open(place / name) as image:
            image.load()


def test_an_empty_prompt_is_legal(load: Any) -> None:
    assert run("run", "--prompt", "", "--seed", 7).stdout == "picture.7.png\n"


def test_warnings_go_to_stderr(load: Any) -> None:
    result = run("run", "--prompt", "fox " * 100, "--seed", 7)
    assert "warning: the prompt is too long" in result.stderr
    assert result.stdout.count("\n") == 1


# What run refuses, before the model is opened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "dmpp_2m"], "unknown sampler 'dmpp_2m'"),
        (["--schedule", "kerras"], "unknown schedule 'kerras'"),
        (["--steps", 0], "steps is 0"),
        (["--width", 0], "width is 0"),
        (["--height", 1_000_000], "height is 1000000"),
        (["--seed", -1], "seed is -1"),
        (["--seed", 2**32], f"seed is {2**32}"),
        (["--seed", 2**32 - 1, "--count", 2], "2 pictures reach past"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--count", 0], "count is 0"),
        (["--out", "x.bmp"], "'x.bmp'"),
        (["--launch", "intl"], "unknown launch 'intl'"),
    ],
)
def test_a_bad_request_is_a_usage_error(load: Any, options: list[object], message: str) -> None:
    with_hint(message, failed(2, "run", "--prompt", "x", *options))
    assert load.calls == []


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert "did you mean 'dpmpp_2m'" in failed(2, "run", "--sampler", "dpm_2m")


@pytest.mark.parametrize(
    "arguments",
    [["run", "--stesp", "3"], ["run", "--steps", "three"], ["run", "more"], ["rnu"], ["inspect"]],
)
def test_a_usage_error(arguments: list[str]) -> None:
    assert "Usage: " in failed(2, *arguments)


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    assert "Did you mean 'inspect'?" in failed(2, "inspekt")


def test_a_file_where_the_folder_should_be(load: Any, place: Path) -> None:
    (place / "taken").write_text("")
    with_hint("taken", failed(1, "run", "--out", "taken/x.png"))
    assert load.calls == []


# What goes wrong during a run


def test_an_error_is_a_message_and_a_hint(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(api, "load", stub.StubLoad("refuse"))
    text = failed(1, "run", "--prompt", "x")
    assert with_hint("NaN in `unet` at step 3", text) == "hint: use --precision f32"
    assert os.listdir(place) == []


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", stub.StubLoad("crash"))
    assert "--debug run" in with_hint("KeyError: 'latent'", failed(1, "run"))


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", stub.StubLoad("crash"))
    result = run("--debug", "run")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "stub.py" in result.stderr


def test_the_log_is_left_as_it_was(load: Any) -> None:
    before = list(logging.getLogger("sdengine").handlers)
    run("run")
    assert logging.getLogger("sdengine").handlers == before


# inspect


def test_inspect_shows_what_is_in_a_bundle(bundle: Path) -> None:
    result = run("inspect", bundle)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for part in (
        "tiny: base, v-prediction, 128 x 64 pixels",
        "sample: float32[B, 4, h, w]",
        "prologue",
        "openvino",
        "bf16, f32",
        "121.5 dB",
        "max abs 1.5e-06",
        "sdengine 0.1.0",
        "beta 0.00085 to 0.012",
        "as remembered",
    ):
        assert part in result.stdout, part
    assert "computed again" in run("inspect", bundle, "--verify").stdout


def test_inspect_as_json(bundle: Path) -> None:
    result = run("inspect", bundle, "--json")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    made = json.loads((bundle / "manifest.json").read_text())
    assert found["model"]["schedule"] == made["model"]["schedule"]
    assert found["components"]["unet"]["weights"] == {
        "file": "unet/weights.safetensors",
        "bytes": len(tiny.WEIGHTS),
        "sha256": made["files"]["unet/weights.safetensors"]["sha256"],
        "tensors": 3,
        "parameters": {"F16": 6, "F32": 2, "BF16": 1},
    }
    assert found["components"]["unet"]["config"] == made["components"]["unet"]["config"]
    assert found["parity"] == made["parity"]
    assert found["bytes"] == sum(f["size"] for f in made["files"].values())
    assert found["verified"] is False


def test_inspect_names_a_corrupt_file(bundle: Path) -> None:
    with open(bundle / "unet/full.onnx", "ab") as file:
        file.write(b"x")
    with_hint("unet/full.onnx", failed(1, "inspect", bundle))


def test_inspect_of_nothing() -> None:
    with_hint("there is no a/b", failed(1, "inspect", "a/b"))
    assert "known: emoji" in failed(2, "inspect", "emojy")


def test_inspect_of_a_picture(load: Any) -> None:
    run("run", "--prompt", "a fox", "--seed", 7, "--out", "x.png")
    found = json.loads(run("inspect", "x.png", "--json").stdout)
    assert found["request"]["prompt"] == "a fox"
    assert found["about"]["backend"] == "fake"
    assert found["parameters"].startswith("a fox\n")
    text = run("inspect", "x.png").stdout
    assert text.startswith("x.png: 64 x 64 pixels\n")
    assert "a fox\n" in text
    assert '"seed": 7' in text


def test_inspect_of_a_picture_that_says_nothing(place: Path) -> None:
    Image.new("RGB", (8, 8)).save(place / "x.png")
    text = run("inspect", "x.png").stdout
    assert text.endswith("this picture does not say how it was made\n")


def test_inspect_of_a_file_that_is_no_picture(place: Path) -> None:
    (place / "x.png").write_bytes(b"hello")
    with_hint("x.png", failed(2, "inspect", "x.png"))


# export


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> dict[str, Any]:
    """Stands in for the two functions that `export` calls; what it was given is in the dict."""
    from sdengine import export

    seen: dict[str, Any] = {}

    def open_checkpoint(path: Path, *, progress: Any, **options: Any) -> str:
        progress(1, 2)
        seen["open"] = (path, options)
        return "opened"

    def export_bundle(checkpoint: str, out: Path, *, progress: Any, **options: Any) -> Path:
        progress("tracing unet", 0.25)
        seen["export"] = (checkpoint, out, options)
        return bundle

    monkeypatch.setattr(export, "open_checkpoint", open_checkpoint, raising=False)
    monkeypatch.setattr(export, "export_bundle", export_bundle, raising=False)
    return seen


def test_export_prints_the_bundles_path(exporter: dict[str, Any], bundle: Path) -> None:
    result = run("export", "x.safetensors", "--out", "y")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{bundle}\n"
    assert result.stderr == "reading\ntracing unet\n"
    assert exporter["open"] == (Path("x.safetensors"), {})
    assert exporter["export"] == ("opened", Path("y"), {"force": False})


def test_every_option_reaches_the_exporter(exporter: dict[str, Any]) -> None:
    result = run(
        "export", "x.ckpt", "-o", "y", "--target", "openvino", "--target", "onnxruntime",
        "--precision", "bf16,f32", "--prediction", "v", "--config", "c.yaml", "--no-ema",
        "--name", "mine", "--licence", "MIT", "--force", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"]["name"] == "tiny"
    options = {"prediction": "v", "config": Path("c.yaml"), "ema": False}
    assert exporter["open"] == (Path("x.ckpt"), options)
    assert exporter["export"][2] == {
        "targets": ["openvino", "onnxruntime"],
        "precisions": ["bf16", "f32"],
        "name": "mine",
        "licence": "MIT",
        "force": True,
    }


def test_a_bundle_is_exported_into_itself(exporter: dict[str, Any], bundle: Path) -> None:
    result = run("export", str(bundle), "--target", "onnxruntime")
    assert result.exit_code == 0, result.stderr
    assert exporter["export"] == ("opened", bundle, {"targets": ["onnxruntime"], "force": False})


def test_a_checkpoint_needs_a_place(exporter: dict[str, Any]) -> None:
    result = run("export", "model/sd21.safetensors")
    assert result.exit_code == 2
    assert "hint: name a folder" in result.stderr
    assert "--out sd21" in result.stderr
    assert exporter == {}


# doctor


def test_doctor_as_json() -> None:
    result = run("doctor", "--json")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert {"openvino", "onnxruntime", "torch"} <= set(found["backends"])
    assert found["auto"] in found["backends"]
    assert result.exit_code == 0
    assert found["packages"]["numpy"]
    assert found["processor"]["threads"] >= 1


def test_doctor_for_people() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "what auto takes" in result.stdout
    assert "openvino" in result.stdout
    assert str(os.environ["SDENGINE_CACHE"]) in result.stdout
