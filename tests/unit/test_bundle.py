"""The reader against docs/bundle-format.md: what it gives, and every row of what it refuses."""

from __future__ import annotations

import builtins
import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdengine.engine import errors
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import (
    BadManifest,
    BundleError,
    CorruptPart,
    MissingPart,
    NotABundle,
    StorageError,
    UnknownFormat,
    UnsafePath,
)
from sdengine.engine.spec import TensorSpec

_spec = importlib.util.spec_from_file_location(
    "tiny_bundle", Path(__file__).parents[1] / "tiny_bundle.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

Manifest = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SDENGINE_CACHE", str(folder))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny.write(folder)
    return folder


def edit(folder: Path, change: Callable[[Manifest], object]) -> None:
    made = json.loads((folder / "manifest.json").read_text())
    change(made)
    tiny.write_manifest(folder, made)


def relist(folder: Path, name: str) -> None:
    """Let the manifest say of this file what is there now."""
    raw = (folder / name).read_bytes()
    edit(folder, lambda m: m["files"].update(tiny.listing({name: raw})))


def refused(kind: type[errors.SdengineError], folder: Path, *words: str) -> errors.SdengineError:
    """It is this class, exactly; its message names each of `words`; it has a hint."""
    with pytest.raises(errors.SdengineError) as caught:
        open_bundle(folder)
    assert type(caught.value) is kind, caught.value
    for word in words:
        assert word in caught.value.message
    assert len(caught.value.hint) > 20
    return caught.value


# What it gives


def test_a_valid_bundle_opens_with_its_facts(bundle: Path) -> None:
    made = json.loads((bundle / "manifest.json").read_text())
    found = open_bundle(bundle)
    facts = found.facts
    assert (facts.name, facts.variant, facts.prediction, facts.licence) == (
        "tiny",
        "base",
        "v",
        "MIT",
    )
    assert facts.native_size == (64, 128)
    schedule = facts.schedule
    assert (schedule.beta_start, schedule.beta_end, schedule.timesteps) == (0.00085, 0.012, 1000)
    assert (facts.latent.scale, facts.latent.factor, facts.latent.multiple) == (0.18215, 8, 8)
    token = facts.tokenizer
    assert (token.start, token.end, token.pad, token.length) == (49406, 49407, 0, 77)
    assert found.tokenizer_file.read_bytes() == b"a vocabulary"
    assert facts.source.sha256 == "ab" * 32
    assert facts.preview is not None
    assert facts.preview.bias == (0.0, 0.0, 0.5)
    assert list(found.components) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    unet = found.component("unet")
    assert unet.spec.input("timestep") == TensorSpec("timestep", "float32", ("B",))
    assert unet.spec.dims == ("B", "h", "w")
    assert unet.graphs["prologue"].path.read_bytes() == b"graph unet/prologue.onnx"
    assert [t.name for t in unet.graphs["deep"].outputs] == ["out_sample", "features0"]
    assert (unet.graphs["deep"].macs, unet.graphs["full"].macs) == (1200, None)
    assert unet.weights_sha256 == hashlib.sha256(tiny.WEIGHTS).hexdigest()
    assert unet.config["levels"] == [1, 2]
    assert found.targets["openvino"].precisions == ("bf16", "f32")
    assert found.targets["openvino"].files == (found.path / "targets/openvino/unet.xml",)
    assert found.parity[0].psnr_db == 121.5
    assert found.files["unet/weights.safetensors"].size == len(tiny.WEIGHTS)
    assert found.producer["torch"] == made["producer"]["torch"]


def test_the_id_is_the_hash_that_the_page_describes(bundle: Path) -> None:
    made = json.loads((bundle / "manifest.json").read_text())
    chosen = {k: made[k] for k in ("format", "model", "components", "files")}
    canonical = json.dumps(chosen, sort_keys=True, separators=(",", ":")).encode()
    assert open_bundle(bundle).id == hashlib.sha256(canonical).hexdigest()[:16]


def test_the_id_leaves_out_targets_and_parity(bundle: Path) -> None:
    before = open_bundle(bundle).id
    edit(bundle, lambda m: m["targets"].update(extra={"precisions": ["f32"], "files": []}))
    edit(bundle, lambda m: m["parity"].clear())
    assert open_bundle(bundle).id == before


@pytest.mark.parametrize("file", ["unet/full.onnx", "unet/weights.safetensors"])
def test_a_component_key_follows_its_own_content_only(bundle: Path, file: str) -> None:
    before = {n: c.key for n, c in open_bundle(bundle).components.items()}
    raw = bytearray((bundle / file).read_bytes())
    raw[-1] ^= 1
    (bundle / file).write_bytes(raw)
    relist(bundle, file)
    after = {n: c.key for n, c in open_bundle(bundle).components.items()}
    assert {n for n in before if before[n] != after[n]} == {"unet"}


def test_preview_is_optional(bundle: Path) -> None:
    edit(bundle, lambda m: m["model"].pop("preview"))
    assert open_bundle(bundle).facts.preview is None


def test_nothing_in_it_can_be_changed(bundle: Path) -> None:
    found = open_bundle(bundle)
    with pytest.raises(TypeError):
        found.components["unet"] = found.components["unet"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        found.facts.name = "other"  # type: ignore[misc]


def test_opening_writes_nothing_into_the_bundle(bundle: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in bundle.rglob("*")}

    before = state()
    open_bundle(bundle, verify=True)
    assert state() == before


def test_a_task_that_needs_another_component_is_told_what_there_is(bundle: Path) -> None:
    with pytest.raises(MissingPart) as caught:
        open_bundle(bundle).component("depth_estimator")
    assert "vae_decoder" in caught.value.message
    assert "task" in caught.value.hint


# NotABundle, UnknownFormat


def test_no_folder(tmp_path: Path) -> None:
    error = refused(NotABundle, tmp_path / "absent", "absent", "nothing")
    assert "sdengine export" in error.hint


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"x")
    refused(NotABundle, tmp_path / "model", "there is a file")


def test_no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    refused(NotABundle, bundle, "manifest.json")


def test_what_a_killed_export_leaves_is_not_opened(bundle: Path) -> None:
    partial = bundle.rename(bundle.parent / ".tiny.partial-1f3a")
    assert "again" in refused(NotABundle, partial, "did not finish").hint
    assert open_bundle(partial, unfinished=True).facts.name == "tiny"


@pytest.mark.parametrize("number", [0, 2, -1, 1.0, True, "1", None])
def test_an_unknown_format_number(bundle: Path, number: object) -> None:
    edit(bundle, lambda m: m.update(format=number))
    error = refused(UnknownFormat, bundle, repr(number), "reads format 1")
    assert ("pip install -U" in error.hint) == (number == 2)


# BadManifest


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff{}",
        b"\xef\xbb\xbf{}",
        b'{"format": 1, "format": 1}',
        b'{"format": 1, "x": NaN}',
        b'{"format": 1, "x": -Infinity}',
        b'{"format": 1, "x": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
    ],
)
def test_not_json(bundle: Path, raw: bytes) -> None:
    (bundle / "manifest.json").write_bytes(raw)
    refused(BadManifest, bundle, "manifest.json", "not JSON")


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"format"', b"null", b"{}"])
def test_not_an_object_with_a_format(bundle: Path, raw: bytes) -> None:
    (bundle / "manifest.json").write_bytes(raw)
    refused(BadManifest, bundle, "format")


def test_a_mistyped_key_is_named_with_the_nearest(bundle: Path) -> None:
    edit(bundle, lambda m: m["model"].update(previw=m["model"].pop("preview")))
    assert "'preview'" in refused(BadManifest, bundle, "`model`", "'previw'").hint


def test_a_missing_key_is_named(bundle: Path) -> None:
    edit(bundle, lambda m: m["model"]["latent"].pop("factor"))
    refused(BadManifest, bundle, "`model.latent`", "the key factor")


def put(value: object, *keys: str | int) -> Callable[[Manifest], None]:
    def change(made: Manifest) -> None:
        place: Any = made
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


SCHEDULE = ("model", "schedule")
UNET = ("components", "unet")

WRONG: list[tuple[Callable[[Manifest], None], str]] = [
    (put("", "model", "name"), "model.name"),
    (put("\ud800", "model", "name"), "model.name"),
    (put("sdxl", "model", "variant"), "model.variant"),
    (put("x0", "model", "prediction"), "model.prediction"),
    (put("linear", *SCHEDULE, "kind"), "model.schedule.kind"),
    (put(0, *SCHEDULE, "beta_start"), "model.schedule.beta_start"),
    (put(1.5, *SCHEDULE, "beta_end"), "model.schedule.beta_end"),
    (put(0.02, *SCHEDULE, "beta_start"), "model.schedule"),
    (put(True, *SCHEDULE, "beta_end"), "model.schedule.beta_end"),
    (put(1000.0, *SCHEDULE, "timesteps"), "model.schedule.timesteps"),
    (put(0, "model", "latent", "scale"), "model.latent.scale"),
    (put([64], "model", "native_size"), "model.native_size"),
    (put([64, 64, 64], "model", "native_size"), "model.native_size"),
    (put([64, 0], "model", "native_size"), "model.native_size[1]"),
    (put(-1, "model", "tokenizer", "pad"), "model.tokenizer.pad"),
    (put("AB" * 32, "model", "source", "sha256"), "model.source.sha256"),
    (put("both", "model", "source", "weights"), "model.source.weights"),
    (put([[1, 2, 3]] * 3, "model", "preview", "matrix"), "model.preview.matrix"),
    (put([[1, 2]] * 4, "model", "preview", "matrix"), "model.preview.matrix[0]"),
    (put({}, "components"), "components"),
    (put("float16", *UNET, "inputs", 0, "dtype"), "components.unet.inputs[0].dtype"),
    (put(["B", -1], *UNET, "inputs", 0, "shape"), "components.unet.inputs[0].shape[1]"),
    (put(["a b"], *UNET, "inputs", 0, "shape"), "components.unet.inputs[0].shape[0]"),
    (put("timestep", *UNET, "inputs", 0, "name"), "components.unet.inputs"),
    (put([], *UNET, "outputs"), "components.unet.outputs"),
    (put([1], *UNET, "config"), "components.unet.config"),
    (put("0" * 63, "files", "unet/full.onnx", "sha256"), "files.unet/full.onnx.sha256"),
    (put(-1, "files", "unet/full.onnx", "size"), "files.unet/full.onnx.size"),
    (put([], "targets", "openvino", "precisions"), "targets.openvino.precisions"),
    (put(["fp4"], "targets", "openvino", "precisions"), "targets.openvino.precisions[0]"),
    (put("dit", "parity", 0, "component"), "parity[0]"),
    (put("shallow7", "parity", 0, "graph"), "parity[0]"),
    (put(-1e-9, "parity", 0, "max_abs"), "parity[0].max_abs"),
    (put(3, "producer", "sdengine"), "producer.sdengine"),
    (put("unet/other.onnx", *UNET, "graphs", "full", "file"), "components.unet.graphs.full.file"),
    (put("targets/x", "targets", "openvino", "files", 0), "targets.openvino.files[0]"),
    (put({"size": 0, "sha256": "0" * 64}, "files", "notes.txt"), "notes.txt"),
    (put({}, *UNET, "graphs", "Full"), "components.unet.graphs, a key"),
    (put(0, *UNET, "graphs", "deep", "macs"), "components.unet.graphs.deep.macs"),
]


@pytest.mark.parametrize(("change", "where"), WRONG, ids=[where for _, where in WRONG])
def test_a_value_of_the_wrong_kind(
    bundle: Path, change: Callable[[Manifest], None], where: str
) -> None:
    edit(bundle, change)
    refused(BadManifest, bundle, where, "manifest.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            put([tiny.KEYS], *UNET, "graphs", "full", "inputs"),
            ("full.inputs", "sample", "timestep"),
        ),
        (
            put([tiny.SAMPLE, tiny.TIMESTEP, tiny.HIDDEN], *UNET, "graphs", "full", "inputs"),
            ("full.inputs", "cross_keys", "encoder_hidden_states"),
        ),
        (
            put([tiny.SAMPLE, tiny.TIMESTEP], *UNET, "graphs", "deep", "inputs"),
            ("graphs.deep.inputs", "cross_keys"),
        ),
        (
            put([tiny.FEATURES], *UNET, "graphs", "deep", "outputs"),
            ("graphs.deep.outputs", "out_sample"),
        ),
        (
            put([tiny.OUT, tiny.tensor("deep0", "B")], *UNET, "graphs", "deep", "outputs"),
            ("graphs.deep.outputs", "further ones called features<k>", "deep0"),
        ),
        (
            put([tiny.OUT], *UNET, "graphs", "deep", "outputs"),
            ("graphs.shallow0", "a graph `deep` that gives features0"),
        ),
        (
            put(
                [tiny.SAMPLE, tiny.tensor("features0", "B", 5, "h", "w")],
                *UNET,
                "graphs",
                "shallow0",
                "inputs",
            ),
            ("graphs.shallow0.inputs", "features0: float32[B, 5, h, w]"),
        ),
        (
            put([tiny.FEATURES, tiny.tensor("else", "B")], *UNET, "graphs", "shallow0", "inputs"),
            ("graphs.shallow0.inputs", "else"),
        ),
        (
            put([tiny.SAMPLE, tiny.FEATURES], *UNET, "graphs", "shallow0", "inputs"),
            ("graphs.shallow0.inputs", "timestep"),
        ),
        (
            put([tiny.OUT, tiny.FEATURES], *UNET, "graphs", "shallow0", "outputs"),
            ("graphs.shallow0.outputs", "features0"),
        ),
        (
            put([tiny.tensor("elsewhere", "B")], *UNET, "graphs", "prologue", "inputs"),
            ("prologue.inputs", "elsewhere"),
        ),
        (
            put([tiny.tensor("cross_keys", "B", 77, 9)], *UNET, "graphs", "prologue", "outputs"),
            ("full.inputs", "cross_keys: float32[B, 77, 9]"),
        ),
        (
            put([tiny.tensor("out_sample", "B", 8, "h", "w")], *UNET, "graphs", "full", "outputs"),
            ("full.outputs", "out_sample"),
        ),
        (
            put([tiny.tensor("latents", "B")], "components", "vae_decoder", "inputs"),
            ("components.vae_decoder.inputs", "'latent'"),
        ),
    ],
)
def test_a_graph_that_disagrees_with_its_component(
    bundle: Path, change: Callable[[Manifest], None], words: tuple[str, ...]
) -> None:
    edit(bundle, change)
    refused(BadManifest, bundle, *words)


# UnsafePath


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../tiny/unet/full.onnx",
        "unet/../unet/full.onnx",
        "./unet/full.onnx",
        "unet//full.onnx",
        "unet/",
        "unet\\full.onnx",
        "C:/full.onnx",
        "unet/full\0.onnx",
    ],
)
@pytest.mark.parametrize("place", ["graph", "weights", "tokenizer", "target", "files"])
def test_a_path_that_could_leave_the_folder(bundle: Path, name: str, place: str) -> None:
    keys: dict[str, tuple[str | int, ...]] = {
        "graph": (*UNET, "graphs", "full", "file"),
        "weights": (*UNET, "weights"),
        "tokenizer": ("model", "tokenizer", "file"),
        "target": ("targets", "openvino", "files", 0),
        "files": ("files", name),
    }
    edit(bundle, put({"size": 0, "sha256": "0" * 64} if place == "files" else name, *keys[place]))
    refused(UnsafePath, bundle, repr(name))


def test_a_link_that_leads_out(bundle: Path, tmp_path: Path) -> None:
    file = bundle / "unet/full.onnx"
    file.rename(tmp_path / "outside.onnx")
    file.symlink_to(tmp_path / "outside.onnx")
    assert "link" in refused(UnsafePath, bundle, "unet/full.onnx", "outside.onnx").hint


def test_a_folder_that_is_a_link_that_leads_out(bundle: Path, tmp_path: Path) -> None:
    (bundle / "unet").rename(tmp_path / "elsewhere")
    (bundle / "unet").symlink_to(tmp_path / "elsewhere")
    refused(UnsafePath, bundle, "leads out")


def test_a_dangling_link_that_leads_out(bundle: Path, tmp_path: Path) -> None:
    (bundle / "unet/full.onnx").unlink()
    (bundle / "unet/full.onnx").symlink_to(tmp_path / "absent")
    refused(UnsafePath, bundle, "leads out")


def test_a_link_that_stays_inside_is_fine(bundle: Path) -> None:
    (bundle / "unet/full.onnx").rename(bundle / "unet/renamed.onnx")
    (bundle / "unet/full.onnx").symlink_to("renamed.onnx")
    assert open_bundle(bundle).facts.name == "tiny"


def test_a_bundle_reached_through_a_link_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").path == bundle.resolve()


# MissingPart


@pytest.mark.parametrize("name", sorted(tiny.contents(tiny.manifest())))
def test_a_file_that_is_not_there(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(MissingPart, bundle, name)


def test_a_component_without_its_full_graph(bundle: Path) -> None:
    edit(bundle, lambda m: m["components"]["vae_decoder"]["graphs"].clear())
    edit(bundle, lambda m: m["files"].pop("vae_decoder/full.onnx"))
    refused(MissingPart, bundle, "components.vae_decoder", "`full`")


def test_a_loop_of_links(bundle: Path) -> None:
    (bundle / "unet/full.onnx").unlink()
    (bundle / "unet/full.onnx").symlink_to("full.onnx")
    refused(MissingPart, bundle, "unet/full.onnx")


# CorruptPart


def test_a_folder_in_a_files_place(bundle: Path) -> None:
    (bundle / "unet/full.onnx").unlink()
    (bundle / "unet/full.onnx").mkdir()
    refused(CorruptPart, bundle, "unet/full.onnx", "not a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_a_files_place_does_not_block(bundle: Path) -> None:
    (bundle / "unet/full.onnx").unlink()
    os.mkfifo(bundle / "unet/full.onnx")
    refused(CorruptPart, bundle, "not a file")


@pytest.mark.parametrize("name", sorted(tiny.contents(tiny.manifest())))
def test_a_file_cut_short(bundle: Path, name: str) -> None:
    raw = (bundle / name).read_bytes()
    (bundle / name).write_bytes(raw[:-1])
    refused(CorruptPart, bundle, name, str(len(raw)), str(len(raw) - 1))


@pytest.mark.parametrize("name", sorted(tiny.contents(tiny.manifest())))
def test_a_changed_byte(bundle: Path, name: str) -> None:
    raw = bytearray((bundle / name).read_bytes())
    raw[-1] ^= 1
    (bundle / name).write_bytes(raw)
    refused(CorruptPart, bundle, name, "SHA-256")


def header(**entry: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4], **entry}})
    return struct.pack("<Q", len(text)) + text.encode()


TWO = json.dumps(
    {
        "a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]},
    }
).encode()

BAD_HEADERS = {
    "empty": b"",
    "shorter than its length": b"\x01\0\0",
    "a header beyond the end": struct.pack("<Q", 2**63) + b"{}",
    "a header of one byte too many": struct.pack("<Q", 3) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"{]",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "an unknown dtype": header(dtype="I4") + b"\0" * 4,
    "a negative side": header(shape=[-2]) + b"\0" * 4,
    "a size unlike its shape": header(shape=[3]) + b"\0" * 4,
    "a gap before it": header(data_offsets=[2, 6]) + b"\0" * 6,
    "an overlap": struct.pack("<Q", len(TWO)) + TWO + b"\0" * 6,
    "data cut short": header() + b"\0" * 3,
    "data beyond the last tensor": header() + b"\0" * 5,
    "three offsets": header(data_offsets=[0, 2, 4]) + b"\0" * 4,
    "an unknown key": header(strides=[1]) + b"\0" * 4,
    "a huge shape": header(shape=[2**40, 2**40]) + b"\0" * 4,
}


@pytest.mark.parametrize("raw", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_damaged_safetensors_header(bundle: Path, raw: bytes) -> None:
    """The hash is right: a writer's mistake, or a file made to mislead."""
    name = "unet/weights.safetensors"
    (bundle / name).write_bytes(raw)
    relist(bundle, name)
    refused(CorruptPart, bundle, name, "safetensors")


# StorageError


def test_a_manifest_that_cannot_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(StorageError, bundle, "manifest.json", "Permission denied")


@pytest.mark.parametrize(
    "name", ["unet/full.onnx", "unet/weights.safetensors", "targets/openvino/unet.xml"]
)
def test_a_file_that_cannot_be_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = builtins.open

    def denied(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", denied)
    refused(StorageError, bundle, name, "Permission denied")


# Hashes, remembered


def test_a_weight_file_is_read_once_and_again_on_verify(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same size, same times: only the full hash can tell, and it is taken on demand."""
    file = bundle / "unet/weights.safetensors"
    open_bundle(bundle)
    real = os.stat(file)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    monkeypatch.setattr(os, "stat", _stat_as_before(os.stat, file, real))
    assert open_bundle(bundle).facts.name == "tiny"
    with pytest.raises(CorruptPart) as caught:
        open_bundle(bundle, verify=True)
    assert "unet/weights.safetensors" in caught.value.message


def _stat_as_before(
    stat: Callable[..., os.stat_result], file: Path, real: os.stat_result
) -> Callable[..., os.stat_result]:
    def answer(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        same = not isinstance(path, int) and os.fspath(path) == str(file)
        return real if same else stat(path, *args, **kwargs)

    return answer


def test_a_restored_time_does_not_hide_a_change(bundle: Path) -> None:
    file = bundle / "unet/weights.safetensors"
    open_bundle(bundle)
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    time.sleep(0.02)  # the clock of the file system ticks every few milliseconds
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(CorruptPart, bundle, "unet/weights.safetensors")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_memory_is_no_memory(bundle: Path, cache: Path, content: bytes) -> None:
    (cache / "hashes.json").write_bytes(content)
    assert open_bundle(bundle).facts.name == "tiny"
    assert len(json.loads((cache / "hashes.json").read_bytes())) == 6  # 4 weights, 2 others


def test_an_unwritable_cache_is_harmless(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "file" / "below"))
    assert open_bundle(bundle).facts.name == "tiny"


def test_a_home_that_nobody_knows_is_harmless(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDENGINE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert open_bundle(bundle).facts.name == "tiny"


def test_opening_takes_less_than_50_ms_once_hashes_are_remembered(bundle: Path) -> None:
    open_bundle(bundle)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        open_bundle(bundle)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


# Any single mutation

# where an entry may go and leave a valid manifest
FREE = {("producer",), ("targets",), ("targets", "openvino", "precisions"), ("parity",)}


def places(value: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place inside the manifest but the inside of a component's config, which is free."""
    if keys:
        yield keys
    if len(keys) == 3 and keys[2] == "config":
        return
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, item in inner:
        yield from places(item, (*keys, key))


def at(value: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        value = value[key]
    return value


def whole() -> Manifest:
    made = tiny.manifest()
    made["files"] = tiny.listing(tiny.contents(made))
    return json.loads(json.dumps(made))  # no two parts share an object


PLACES = list(places(whole()))
OTHER_TYPES = [None, True, -7, 1.5, "", "x" * 300, "\udc80", [], [[]], {}, {"a": 1}]


@st.composite
def mutated(draw: st.DrawFn) -> Manifest:
    made = whole()
    keys = draw(st.sampled_from(PLACES))
    holder, last, value = at(made, keys[:-1]), keys[-1], at(made, keys)
    ways = ["retype"]
    if keys[:-1] not in FREE and keys != ("model", "preview") and last != "macs":
        ways.append("drop")
    if isinstance(value, dict) and last != "config":
        ways.append("add")
    way = draw(st.sampled_from(ways))
    if way == "drop":
        del holder[last]
    elif way == "add":
        value[draw(st.sampled_from(["extra", "", "x/../y", "X y"]))] = 0
    else:
        nullable = last == "psnr_db"
        others = [o for o in OTHER_TYPES if not like(value, o) and not (nullable and o is None)]
        holder[last] = copy.deepcopy(draw(st.sampled_from(others)))
    return made


def like(value: Any, other: Any) -> bool:
    """Whether `other` could stand where `value` stands."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return type(other) in (int, float)
    if isinstance(value, str):
        return isinstance(other, str) and len(other) == 300  # free text
    return type(value) is type(other)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(made=mutated())
@example(made=None)
@example(made=[])
def test_no_single_mutation_passes(bundle: Path, made: Any) -> None:
    tiny.write_manifest(bundle, made)
    with pytest.raises(BundleError):
        open_bundle(bundle)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damage_to_the_bytes_is_more_than_a_bundle_error(
    bundle: Path, data: st.DataObject
) -> None:
    raw = bytearray(json.dumps(whole()).encode())
    start = data.draw(st.integers(0, len(raw) - 1))
    raw[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    (bundle / "manifest.json").write_bytes(raw)
    with contextlib.suppress(BundleError):
        open_bundle(bundle)


# The safetensors library's own idea of a sound file


def test_headers_are_read_as_the_library_writes_them(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    import numpy as np

    from sdengine.engine.weights import read_header

    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(5, np.float32)}
    file = tmp_path / "x.safetensors"
    library.save_file(arrays, file, metadata={"format": "pt"})
    found = read_header(file)
    raw = file.read_bytes()
    assert set(found) == set(arrays)
    for name, stored in found.items():
        assert stored.shape == arrays[name].shape
        assert raw[stored.offset : stored.offset + stored.nbytes] == arrays[name].tobytes()


def test_the_tiny_weights_are_sound_by_the_library_too() -> None:
    library = pytest.importorskip("safetensors")
    assert {name for name, _ in library.deserialize(tiny.WEIGHTS)} == {
        "a.weight",
        "a.bias",
        "scale",
    }
