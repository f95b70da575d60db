"""The composition root: what `--model`, `--backend` and `--precision` lead to."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from sdengine import api
from sdengine.engine.bundle import Target, open_bundle
from sdengine.engine.errors import BackendUnavailable, NotABundle, RequestError, UnknownName
from sdengine.engine.ports import Probe


def tiny():
    path = Path(__file__).parents[1] / "tiny_bundle.py"
    spec = importlib.util.spec_from_file_location("tiny_bundle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exports(monkeypatch, tmp_path):
    """Stands in for the export, with a cache of its own; lists the files that were exported."""
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "cache"))
    from sdengine import export
    from sdengine.export import checkpoint

    done = []

    def export_bundle(opened, out, *, progress):
        progress("tracing", 0.5)
        done.append(opened.name)
        tiny().write(out)

    monkeypatch.setattr(export, "export_bundle", export_bundle, raising=False)
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path: path)
    return done


@pytest.mark.export
def test_a_checkpoint_is_exported_once_whatever_its_name(exports, make_checkpoint, tmp_path):
    seen = []
    original = make_checkpoint("base")
    for name in ("one", "two"):
        for suffix in (".safetensors", ".yaml"):
            copy = tmp_path / f"{name}{suffix}"
            copy.write_bytes(original.with_suffix(suffix).read_bytes())
    first, again, other_name = (
        api.find_model(tmp_path / f"{name}.safetensors", lambda *at: seen.append(at))
        for name in ("one", "one", "two")
    )
    assert first == again == other_name
    assert exports == ["one.safetensors"]
    assert seen == [("tracing", 0.5)]
    assert open_bundle(first).facts.name == "tiny"


@pytest.mark.export
def test_another_content_is_another_bundle(exports, make_checkpoint):
    paths = {api.find_model(make_checkpoint("base", seed=seed), print_nothing)
             for seed in (11, 12)}  # fmt: skip
    assert len(paths) == len(exports) == 2


def print_nothing(*_):
    pass


def test_an_embedded_model_is_found_by_its_name():
    assert open_bundle(api.find_model("emoji")).facts.name == "emoji"


@pytest.mark.parametrize(
    ("model", "error", "hint"),
    [
        ("emojy", UnknownName, "'emoji'"),
        ("no/such.safetensors", NotABundle, "emoji"),
    ],
)
def test_what_is_not_there(model, error, hint):
    with pytest.raises(error) as caught:
        api.find_model(model)
    assert hint in caught.value.hint


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(NotABundle, match=r"manifest\.json") as caught:
        api.find_model(tmp_path)
    assert "sdengine export CHECKPOINT --out FOLDER" in caught.value.hint


@pytest.fixture
def bundle(tmp_path):
    tiny().write(tmp_path / "b")
    opened = open_bundle(tmp_path / "b")
    return replace(opened, targets={"openvino": Target("openvino", ("bf16", "f32"), ())})


BF16 = Probe(True, "", precisions=("bf16", "f32"))
F32 = Probe(True, "", precisions=("f32",))


@pytest.mark.parametrize(
    ("backend", "probe", "asked", "expected"),
    [
        ("openvino", BF16, None, "bf16"),
        ("openvino", F32, None, "f32"),
        ("torch", BF16, None, "f32"),  # no proof of bfloat16 on torch in this bundle
        ("openvino", BF16, "f32", "f32"),
    ],
)
def test_precision(bundle, backend, probe, asked, expected):
    assert api.choose_precision(bundle, backend, probe, asked) == expected


@pytest.mark.parametrize(
    ("backend", "probe", "asked", "error", "hint"),
    [
        ("openvino", F32, "bf16", BackendUnavailable, "use one of: f32"),
        ("torch", BF16, "bf16", RequestError, "--target torch --precision bf16"),
        ("openvino", BF16, "f23", UnknownName, "'f32'"),
    ],
)
def test_a_precision_that_cannot_be_had(bundle, backend, probe, asked, error, hint):
    with pytest.raises(error) as caught:
        api.choose_precision(bundle, backend, probe, asked)
    assert hint in caught.value.hint
