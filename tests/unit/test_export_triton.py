"""A bundle as tritonserver's model repository. Judges: tritonclient's own reader of configs (built
from NVIDIA's model_config.proto), and ONNX Runtime, which opens each graph where it was put."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from sdengine.api import EMBEDDED
from sdengine.cli import app
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError, StorageError
from sdengine.export import repository, triton

pytestmark = [pytest.mark.export, pytest.mark.ort]

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(EMBEDDED["emoji"], tmp_path_factory.mktemp("triton") / "models")


@pytest.fixture(scope="module")
def read() -> Any:
    """Text of a config.pbtxt -> ModelConfig. One file of the package: the others need grpc."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient==2.73.0")
    from google.protobuf import text_format

    place = Path(next(iter(found.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: text_format.Parse(text, module.ModelConfig())


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_each_network_has_a_model_and_the_pipeline_too(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "sdengine", "text_encoder", "unet", "unet_prologue", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
    assert [path.name for path in written.parent.iterdir()] == ["models"], "nothing is left"


def test_configs_say_what_the_graphs_take_and_give(written: Path, read: Any) -> None:
    seen = 0
    for place in written.iterdir():
        config = read((place / "config.pbtxt").read_text())
        assert (config.name, config.max_batch_size) == (place.name, 0)
        if place.name == "sdengine":
            assert config.backend == "python"
            continue
        assert config.backend == "openvino"
        graph = session(place / "1" / config.default_model_filename)
        for ours, theirs in (
            (config.input, graph.get_inputs()),
            (config.output, graph.get_outputs()),
        ):
            said = {t.name: (t.DESCRIPTOR.fields_by_name["data_type"].enum_type
                              .values_by_number[t.data_type].name, list(t.dims))
                    for t in ours}  # fmt: skip
            wanted = {
                t.name: (TYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape])
                for t in theirs
            }
            assert said == wanted
        seen += 1
    assert seen == 5


def test_weights_come_with_the_graph_and_take_no_room(written: Path) -> None:
    """A graph finds its weights from where it was put; its results are those of the bundle's."""
    latent = np.linspace(-1, 1, 4 * 16 * 16, dtype=np.float32).reshape(1, 4, 16, 16)
    there = written / "vae_decoder" / "1"
    (found,) = session(there / "full.onnx").run(None, {"latent": latent})
    bundle = open_bundle(EMBEDDED["emoji"])
    (wanted,) = session(bundle.component("vae_decoder").graphs["full"].path).run(
        None, {"latent": latent}
    )
    assert np.array_equal(found, wanted)
    assert np.ptp(found) > 0
    assert not any(path.is_symlink() for path in written.rglob("*"))
    if there.stat().st_dev == bundle.path.stat().st_dev:
        weights = bundle.component("vae_decoder").weights
        assert (there / weights.name).samefile(weights)


def test_where_no_links_are_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    out = repository(EMBEDDED["emoji"], tmp_path / "models")
    assert open_bundle(out / "sdengine" / "1" / "bundle").id == open_bundle(EMBEDDED["emoji"]).id
    session(out / "unet" / "1" / "full.onnx")


def test_the_target_decides_who_runs_it(tmp_path: Path, read: Any) -> None:
    for name, backend, accelerator in (
        ("onnxruntime", "onnxruntime", []),
        ("trt", "onnxruntime", ["tensorrt"]),
    ):
        bundle = proved_on(tmp_path / f"for-{name}", name)
        out = repository(bundle, tmp_path / name, name)
        config = read((out / "unet" / "config.pbtxt").read_text())
        assert config.backend == backend
        gpu = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert [one.name for one in gpu] == accelerator


def test_tensorrt_takes_the_float16_graphs_where_there_are_such() -> None:
    bundle = open_bundle(EMBEDDED["emoji"])
    unet = bundle.components["unet"]
    half = replace(unet, weights=Path("weights.f16.safetensors"))
    both = replace(bundle, components={"unet": replace(unet, typed={"f16": half})})
    for target, expected in (("trt", half.weights), ("openvino", unet.weights)):
        assert {weights for _, _, weights in triton._models(both, target)} == {expected}


def proved_on(place: Path, target: str) -> Path:
    """A copy of the embedded bundle whose manifest promises a target."""
    shutil.copytree(EMBEDDED["emoji"], place)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["targets"][target] = {"precisions": ["f32"], "files": []}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize("target", ["trt", "coreml"])
def test_a_target_that_the_bundle_was_not_proved_on(tmp_path: Path, target: str) -> None:
    with pytest.raises(RequestError, match=f"not proved on {target}.* it was on openvino") as error:
        repository(EMBEDDED["emoji"], tmp_path / "models", target)
    assert f"--target {target if target == 'trt' else 'onnxruntime'}" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(StorageError, match="is not empty") as error:
        repository(EMBEDDED["emoji"], tmp_path)
    assert "--out models" in error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "link", full)
    with pytest.raises(StorageError, match="No space left") as error:
        repository(EMBEDDED["emoji"], tmp_path / "models")
    assert "the disk is full" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--layout", "tritn", "--out", "x"], "unknown layout 'tritn'", "did you mean 'triton'"),
        (["--layout", "triton"], "needs one folder to write", "--out models"),
        (["--layout", "triton", "--out", "x", "-t", "trt", "-t", "openvino"],
         "takes one target", "--target onnxruntime"),
        (["--layout", "triton", "--out", "x", "--force", "--name", "a"],
         "--layout goes without --force, --name", "make the bundle with those"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_makes_no_sense(
    options: list[str], message: str, hint: str
) -> None:
    result = CliRunner().invoke(app, ["export", str(EMBEDDED["emoji"]), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert hint in result.stderr


def test_the_command_prints_the_repository(tmp_path: Path) -> None:
    out = tmp_path / "models"
    words = ["export", str(EMBEDDED["emoji"]), "--layout", "triton", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert (out / "sdengine" / "1" / "model.py").is_file()
