"""Typed networks and engines: what the manifest may say of them, and which engine fits a GPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdengine.backends import plans
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BadManifest, MissingPart
from sdengine.engine.spec import Engine

_spec = importlib.util.spec_from_file_location(
    "tiny_bundle", Path(__file__).parents[1] / "tiny_bundle.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

VERSION = "1.7.1.116"
STATIC = {"B": [2, 2, 2], "h": [64, 64, 64], "w": [64, 64, 64]}
RANGE = {"B": [1, 2, 8], "h": [32, 64, 96], "w": [32, 64, 96]}


def write(folder: Path, *engines: Mapping[str, Any]) -> Path:
    """A tiny bundle whose unet has typed graphs, and these engines of it."""
    made = tiny.write(folder)
    unet = made["components"]["unet"]
    typed = {n: {**g, "file": f"unet/{n}.f16.onnx"} for n, g in unet["graphs"].items()}
    unet["typed"] = {
        "f16": {
            "graphs": typed,
            "weights": unet["weights"],
            "source": made["files"][unet["weights"]]["sha256"],
            "recipe": {"half": "f16"},
        }
    }
    files = {g["file"]: f"typed {g['file']}".encode() for g in typed.values()}
    files |= {e["file"]: b"an engine" for e in engines}
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    made["files"] |= tiny.listing(files)
    if engines:
        made["targets"]["trt-rtx"] = {
            "precisions": ["f16"],
            "files": [e["file"] for e in engines],
            "engines": list(engines),
        }
    tiny.write_manifest(folder, made)
    return folder


def engine(dims: Mapping[str, Any] = STATIC, sm: int = 89, **changes: Any) -> dict[str, Any]:
    shape = "-".join(f"{d}{'_'.join(map(str, n))}" for d, n in dims.items())
    return {
        "file": f"targets/trt-rtx/sm{sm}/unet/full.f16.{shape}.engine",
        "component": "unet",
        "precision": "f16",
        "graph": "full",
        "sm": sm,
        "dims": dict(dims),
        "version": VERSION,
        "fingerprint": "0" * 64,
        **changes,
    }


def true_fingerprints(folder: Path) -> Path:
    """The manifest with the fingerprints that its engines should have."""
    network = open_bundle(folder).components["unet"].typed["f16"]
    made = json.loads((folder / "manifest.json").read_text())
    for entry in made["targets"]["trt-rtx"]["engines"]:
        spans = {d: tuple(n) for d, n in entry["dims"].items()}
        content = plans.what(network, entry["graph"], spans)
        maker = plans.made("tensorrt_rtx", entry["version"], entry["sm"])
        entry["fingerprint"] = plans.fingerprint(content, maker)
    tiny.write_manifest(folder, made)
    return folder


# The manifest


def test_the_reader_gives_typed_networks_and_their_engines(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b", engine(), engine(sm=120)))
    unet = bundle.components["unet"]
    typed = plans.typed(unet, "f16")
    assert typed.spec == unet.spec
    assert typed.graphs["full"].path == bundle.path / "unet/full.f16.onnx"
    assert typed.key != unet.key
    assert [e.sm for e in typed.engines] == [89, 120]
    assert typed.engines[0].dims == {"B": (2, 2, 2), "h": (64, 64, 64), "w": (64, 64, 64)}
    assert not unet.engines
    assert not bundle.components["vae_decoder"].typed


def test_a_precision_without_typed_graphs_says_how_to_make_them(tmp_path: Path) -> None:
    unet = open_bundle(write(tmp_path / "b")).components["unet"]
    with pytest.raises(MissingPart, match="no strongly typed graphs in bf16") as caught:
        plans.typed(unet, "bf16")
    assert "--target trt --precision bf16" in caught.value.hint
    assert "f16" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"component": "vae_decoder"}, "a typed graph of this bundle"),
        ({"component": "nobody"}, "a typed graph of this bundle"),
        ({"precision": "bf16"}, "unet/full in bf16"),
        ({"graph": "shallow7"}, "shallow7"),
        ({"dims": {"B": [2, 2, 2]}}, "sizes of B, h, w"),
        ({"dims": {**STATIC, "B": [2, 1, 2]}}, "in this order"),
        ({"dims": {**STATIC, "B": [2, 2]}}, "a list of 3 entries"),
        ({"sm": 8.9}, "engines[0].sm"),
        ({"fingerprint": "f"}, "64 hex digits"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_engine_entry_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path / "b", engine(**changes))
    with pytest.raises(BadManifest) as caught:
        open_bundle(folder)
    assert words in caught.value.message
    assert "sdengine export" in caught.value.hint


def test_an_engine_must_be_a_file_of_its_target(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", engine())
    made = json.loads((folder / "manifest.json").read_text())
    made["targets"]["trt-rtx"]["engines"][0]["file"] = "unet/full.onnx"
    tiny.write_manifest(folder, made)
    with pytest.raises(BadManifest, match="one of the target's files"):
        open_bundle(folder)


def test_typed_graphs_of_other_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "b")
    made = json.loads((folder / "manifest.json").read_text())
    made["components"]["unet"]["typed"]["f16"]["source"] = "cd" * 32
    tiny.write_manifest(folder, made)
    with pytest.raises(BadManifest, match=r"typed\.f16\.source"):
        open_bundle(folder)


# Which engine fits


def found(folder: Path, dims: Mapping[str, int], sm: int = 89, version: str = VERSION) -> Any:
    network = open_bundle(folder).components["unet"].typed["f16"]
    return plans.find(network, "full", dims, sm, version)


def test_the_engine_of_the_very_sizes_comes_before_a_range(tmp_path: Path) -> None:
    folder = true_fingerprints(write(tmp_path / "b", engine(RANGE), engine(STATIC)))
    assert found(folder, {"B": 2, "h": 64, "w": 64}).dims["B"] == (2, 2, 2)
    assert found(folder, {"B": 3, "h": 64, "w": 96}).dims["B"] == (1, 2, 8)
    assert found(folder, {"h": 64, "w": 64}).dims["B"] == (1, 2, 8)  # B is left open


@pytest.mark.parametrize(
    ("dims", "sm", "version", "reason"),
    [
        ({"B": 2, "h": 128, "w": 64}, 89, VERSION, "wanted: B=2, h=128, w=64"),
        ({"h": 64, "w": 64}, 89, VERSION, "built for B=2, h=64, w=64"),
        ({"B": 2, "h": 64, "w": 64}, 90, VERSION, "built for sm86, sm89; this GPU is sm90"),
        ({"B": 2, "h": 64, "w": 64}, 89, "1.8.0", "built with trt-rtx 1.7.1.116; here is 1.8.0"),
    ],
)
def test_why_no_engine_fits(
    tmp_path: Path, dims: dict[str, int], sm: int, version: str, reason: str
) -> None:
    folder = true_fingerprints(write(tmp_path / "b", engine(), engine(sm=86)))
    answer = found(folder, dims, sm, version)
    assert isinstance(answer, str)
    assert reason in answer


def test_a_graph_without_engines_and_one_of_other_weights_say_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", engine())  # its fingerprint is not the one that is due
    network = open_bundle(folder).components["unet"].typed["f16"]
    dims = {"B": 2, "h": 64, "w": 64}
    assert "ahead of time" in str(plans.find(network, "deep", dims, 89, VERSION))
    assert "other weights" in str(plans.find(network, "full", dims, 89, VERSION))


@pytest.mark.parametrize(
    "change",
    [
        lambda what, made: what.update(weights="1" * 64),
        lambda what, made: what.update(graph="1" * 64),
        lambda what, made: what.update(shapes="B=4"),
        lambda what, made: what.update(recipe="another"),
        lambda what, made: made.update(version="9"),
        lambda what, made: made.update(device="sm120"),
        lambda what, made: made.update(library="tensorrt"),
    ],
)
def test_all_that_goes_in_changes_the_fingerprint(
    tmp_path: Path, change: Callable[[dict[str, str], dict[str, str]], None]
) -> None:
    network = open_bundle(write(tmp_path / "b")).components["unet"].typed["f16"]
    sizes = plans.spans(network.graphs["full"], {"B": 2, "h": 64, "w": (32, 64, 96), "T": 77})
    assert sizes == {"B": (2, 2, 2), "h": (64, 64, 64), "w": (32, 64, 96)}
    content, maker = plans.what(network, "full", sizes), plans.made("tensorrt_rtx", VERSION, 89)
    before = plans.fingerprint(content, maker)
    assert before == plans.fingerprint(dict(reversed(content.items())), dict(maker))
    change(content, maker)
    assert plans.fingerprint(content, maker) != before


def test_the_place_of_an_engine_tells_what_it_is() -> None:
    dims = {"w": (64, 64, 64), "B": (1, 2, 8)}
    assert plans.engine_path("unet", "deep", "bf16", dims, 120) == (
        "targets/trt-rtx/sm120/unet/deep.bf16.B1_2_8-w64.engine"
    )
    assert Engine("trt-rtx", "deep", Path("x"), 120, dims, VERSION, "0") is not None


def test_quantising_anew_drops_what_was_made_of_the_old_network(tmp_path: Path) -> None:
    """Typed int8 graphs and their engines go; those in float16 stay."""
    pytest.importorskip("torch")
    from sdengine.export.run import _describe_twins, _twin_files

    folder = write(tmp_path / "b", engine(), engine(precision="int8", file="targets/x.engine"))
    made = json.loads((folder / "manifest.json").read_text())
    unet = made["components"]["unet"]
    quantised = {n: {**g, "file": f"unet/int8/{n}.onnx"} for n, g in unet["graphs"].items()}
    typed = {n: {**g, "file": f"unet/int8/{n}.int8.onnx"} for n, g in unet["graphs"].items()}
    files = {g["file"]: b"graph" for g in (*quantised.values(), *typed.values())}
    files["unet/int8/weights.safetensors"] = tiny.WEIGHTS
    (folder / "unet/int8").mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    made["files"] |= tiny.listing(files)
    weights = "unet/int8/weights.safetensors"
    sources = (made["files"][unet["weights"]]["sha256"], made["files"][weights]["sha256"])
    for key, graphs, source in zip(
        ("quantised", "typed"), (quantised, typed), sources, strict=True
    ):
        entry = {"graphs": graphs, "weights": weights, "source": source, "recipe": {}}
        unet.setdefault(key, {})["int8"] = entry
    tiny.write_manifest(folder, made)
    bundle = open_bundle(folder)
    replaced = _twin_files(bundle)
    assert replaced == {*files, "targets/x.engine"}
    _describe_twins(made, folder, {"unet": bundle.components["vae_decoder"]}, replaced)
    assert list(unet["typed"]) == ["f16"]
    assert made["targets"]["trt-rtx"]["files"] == [engine()["file"]]
    assert [e["precision"] for e in made["targets"]["trt-rtx"]["engines"]] == ["f16"]
    assert not replaced & set(made["files"])
