"""A small checkpoint through the whole export, and what is refused on the way."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from sdengine.backends import get
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import StorageError, UnknownName

pytestmark = [pytest.mark.export, pytest.mark.ov]


@pytest.fixture
def copy(mini_bundle, tmp_path):
    """The bundle, to be changed by the test."""
    return shutil.copytree(mini_bundle, tmp_path / "mini")


def test_bundle_opens_and_states_the_facts(mini_bundle, mini):
    bundle = open_bundle(mini_bundle, verify=True)
    assert bundle.facts == mini.facts
    assert bundle.facts.native_size == (32, 32)
    assert set(bundle.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert "f32" in bundle.targets["openvino"].precisions
    assert not list(mini_bundle.parent.glob(".*"))


def test_every_component_was_judged_on_every_runtime(mini_bundle):
    bundle = open_bundle(mini_bundle)
    judged = {(r.component, r.runtime, r.precision) for r in bundle.parity}
    for name in bundle.components:
        assert (name, "openvino", "f32") in judged
        for precision in bundle.targets["openvino"].precisions:
            assert (name, "openvino", precision) in judged
    cases = {r.case for r in bundle.parity if r.component == "unet" and r.precision == "f32"}
    assert {"early", "middle", "late", "middle (traced)", "middle (tidied)"} <= cases
    for r in bundle.parity:
        assert r.psnr_db is None or r.psnr_db >= {"f32": 80}.get(r.precision, 40)


def test_weight_files_are_the_checkpoint(mini_bundle, mini_file):
    """Put together they hold every tensor of the source, bit for bit."""
    found = {}
    for file in mini_bundle.glob("*/weights.safetensors"):
        found |= load_file(file)
    expected = load_file(mini_file)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], expected[n]) for n in expected)


def test_graphs_hold_no_paths_and_no_weights(mini_bundle):
    for file in mini_bundle.glob("*/*.onnx"):
        raw = file.read_bytes()
        assert b"/" + b"work" not in raw
        assert b".py" not in raw
        model = onnx.load(file, load_external_data=False)
        onnx.checker.check_model(file)
        assert not model.metadata_props
        inside = [t for t in model.graph.initializer if not t.external_data]
        # the causal mask, 77 x 77, is the largest constant
        assert sum(len(t.raw_data) for t in inside) < 40_000, file


def test_prologue_takes_the_text_alone(mini_bundle):
    unet = open_bundle(mini_bundle).components["unet"]
    assert [t.name for t in unet.graphs["prologue"].inputs] == ["encoder_hidden_states"]
    keys = [t.name for t in unet.graphs["prologue"].outputs]
    assert len(keys) == 2 * 4  # keys and values of four transformers
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_k" in keys
    taken = [t.name for t in unet.graphs["full"].inputs]
    assert taken == ["sample", "timestep", *keys]


def test_second_export_is_the_same_bytes(mini_bundle, mini, tmp_path):
    """Tracing again, in the same process, after other traces: no name or order may drift."""
    from sdengine.export.components import parts
    from sdengine.export.graphs import Place, build_graphs
    from sdengine.export.weights_file import write_weights

    from_before = open_bundle(mini_bundle).components
    for part in parts(mini.facts, mini.configs, (0, 1)):
        if part.name.startswith("vae"):
            continue  # test_trace.py does it for the encoder
        folder = tmp_path / part.name
        folder.mkdir()
        refs = [mini.tensors[n] for n in part.tensor_names()]
        sha256 = write_weights(folder / "weights.safetensors", reversed(refs))
        again = build_graphs(part, Place(folder, sha256), lambda component, stage: None)
        before = from_before[part.name]
        assert again.weights_sha256 == before.weights_sha256
        assert {n: g.sha256 for n, g in again.graphs.items()} == {
            n: g.sha256 for n, g in before.graphs.items()
        }


def test_same_checkpoint_again_is_not_exported_again(mini, copy, caplog):
    from sdengine.export import export_bundle

    before = (copy / "manifest.json").stat()
    with caplog.at_level("INFO", "sdengine.export"):
        assert export_bundle(mini, copy) == copy
    after = (copy / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "same checkpoint" in caplog.text


def test_bundle_of_another_checkpoint_is_left_alone(mini, copy):
    from sdengine.export import export_bundle

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["source"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="another bundle") as error:
        export_bundle(mini, copy)
    assert "--force" in error.value.hint
    assert json.loads((copy / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize("content", ["file", "folder"])
def test_something_else_at_the_place_is_left_alone(mini, tmp_path, content):
    from sdengine.export import export_bundle

    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(StorageError, match="not a bundle") as error:
        export_bundle(mini, out, force=True)
    assert "--out" in error.value.hint
    assert (out if content == "file" else out / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "kind"),
    [({"targets": ["openvin"]}, "target"), ({"precisions": ["b16"]}, "precision")],
)
def test_unknown_names_are_answered_with_near_ones(mini, tmp_path, option, kind):
    from sdengine.export import export_bundle

    with pytest.raises(UnknownName, match=f"unknown {kind}") as error:
        export_bundle(mini, tmp_path / "out", **option)
    assert "did you mean" in error.value.hint
    assert not list(tmp_path.iterdir())


# bf16 where the processor has it; what torch's own probe says, not the export's
BF16_AND_F32 = ("bf16", "f32") if "bf16" in get("torch").probe().precisions else ("f32",)


@pytest.mark.ort
def test_a_target_is_added_without_copying(mini, copy):
    from sdengine.export import export_bundle

    before = open_bundle(copy)
    inode = before.components["unet"].weights.stat().st_ino
    handle = open(before.components["unet"].weights, "rb")  # a reader of the old bundle
    assert export_bundle(mini, copy, targets=["openvino", "onnxruntime", "torch"]) == copy
    after = open_bundle(copy, verify=True)
    assert set(after.targets) == {"openvino", "onnxruntime", "torch"}
    assert after.targets["onnxruntime"].precisions == ("f32",)
    assert after.targets["torch"].precisions == BF16_AND_F32
    assert after.targets["openvino"] == before.targets["openvino"]
    assert after.id == before.id
    assert after.components["unet"].weights.stat().st_ino == inode
    assert handle.read(8)
    handle.close()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["mini"]
    subjects = [
        (r.component, r.graph, r.runtime, r.precision, r.case, r.output) for r in after.parity
    ]
    assert len(subjects) == len(set(subjects))
