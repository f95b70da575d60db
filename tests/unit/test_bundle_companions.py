"""Facts and components that only some variants have: read, and refused where they do not fit."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdengine.engine.bundle import STATISTICS, open_bundle
from sdengine.engine.errors import BadManifest, CorruptPart, MissingPart, SdengineError
from sdengine.engine.weights import read_tensors

_spec = importlib.util.spec_from_file_location(
    "tiny_bundle", Path(__file__).parents[1] / "tiny_bundle.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

Manifest = dict[str, Any]

CONDITIONING = {
    "size": 28,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.3],
    "embedding": 2,
    "noise": {"kind": "squaredcos_cap_v2", "timesteps": 1000},
    "statistics": True,
}
SCHEDULE = {"kind": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02, "timesteps": 1000}
VECTOR = struct.pack("<2f", 0.25, -3.0)


def written(folder: Path, statistics: dict[str, Any]) -> None:
    """A bundle with an image tower whose weight file has these tensors too."""
    made = tiny.manifest()
    made["model"]["variant"] = "unclip-l"
    made["model"]["image_conditioning"] = json.loads(json.dumps(CONDITIONING))
    pixels, embedding = tiny.tensor("pixels", "B", 3, 28, 28), tiny.tensor("embedding", "B", 2)
    made["components"]["image_encoder"] = tiny.simple("image_encoder", [pixels], [embedding])
    files = tiny.contents(made)
    files["image_encoder/weights.safetensors"] = tiny.safetensors(
        {"a.weight": ("F16", [2, 3], bytes(range(12))), **statistics}
    )
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    made["files"] = tiny.listing(files)
    tiny.write_manifest(folder, made)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    written(tmp_path / "tiny", {name: ("F32", [2], VECTOR) for name in STATISTICS})
    return tmp_path / "tiny"


def edit(folder: Path, change: Callable[[Manifest], object]) -> None:
    made = json.loads((folder / "manifest.json").read_text())
    change(made)
    tiny.write_manifest(folder, made)


def refused(kind: type[SdengineError], folder: Path, *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_bundle(folder)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint


def test_image_conditioning(bundle: Path) -> None:
    opened = open_bundle(bundle)
    facts = opened.facts.image_conditioning
    assert facts is not None
    assert (facts.size, facts.embedding, facts.statistics) == (28, 2, True)
    assert (facts.mean, facts.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    assert (facts.noise.kind, facts.noise.timesteps) == ("squaredcos_cap_v2", 1000)
    assert opened.facts.low_scale is None
    found = read_tensors(opened.component("image_encoder").weights, STATISTICS)
    assert list(found) == list(STATISTICS)
    assert all(v.tolist() == [0.25, -3.0] for v in found.values())


def test_low_scale(bundle: Path) -> None:
    low = {"schedule": SCHEDULE, "max_level": 350}
    edit(bundle, lambda m: m["model"].update(low_scale=low))
    facts = open_bundle(bundle).facts.low_scale
    assert facts is not None
    assert (facts.schedule.beta_end, facts.max_level) == (0.02, 350)


@pytest.mark.parametrize(
    ("low", "words"),
    [
        ({"schedule": SCHEDULE, "max_level": 1000}, "low_scale.max_level"),
        ({"schedule": {**SCHEDULE, "beta_start": 0.5}, "max_level": 3}, "low_scale.schedule"),
        ({"schedule": SCHEDULE}, "max_level"),
        ({"schedule": SCHEDULE, "max_level": 3, "level": 1}, "level"),
    ],
)
def test_low_scale_that_cannot_be(bundle: Path, low: Any, words: str) -> None:
    edit(bundle, lambda m: m["model"].update(low_scale=low))
    refused(BadManifest, bundle, words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 56),
        ("embedding", 3),
        ("statistics", "yes"),
        ("statistics", 1),
        ("std", [0.0, 1.0, 1.0]),
        ("mean", [0.0, 1.0]),
        ("noise", {"kind": "linear", "timesteps": 1000}),
    ],
)
def test_image_conditioning_that_cannot_be(bundle: Path, key: str, value: Any) -> None:
    edit(bundle, lambda m: m["model"]["image_conditioning"].update({key: value}))
    refused(BadManifest, bundle, f"image_conditioning.{key}")


def test_image_conditioning_without_a_tower(bundle: Path) -> None:
    def change(made: Manifest) -> None:
        del made["components"]["image_encoder"]
        for name in [n for n in made["files"] if n.startswith("image_encoder/")]:
            del made["files"][name]

    edit(bundle, change)
    refused(MissingPart, bundle, "image_encoder", "text_encoder")


@pytest.mark.parametrize(
    ("statistics", "found"),
    [
        ({}, "nothing"),
        ({name: ("F16", [2], bytes(4)) for name in STATISTICS}, "F16"),
        ({name: ("F32", [1, 2], VECTOR) for name in STATISTICS}, "F32 [1, 2]"),
    ],
)
def test_statistics_that_are_not_there(tmp_path: Path, statistics: Any, found: str) -> None:
    written(tmp_path / "tiny", statistics)
    refused(CorruptPart, tmp_path / "tiny", STATISTICS[0], f"found {found}")
    edit(tmp_path / "tiny", lambda m: m["model"]["image_conditioning"].update(statistics=False))
    open_bundle(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("name", "where", "lost"),
    [("image_encoder", "inputs", "pixels"), ("image_encoder", "outputs", "embedding")],
)
def test_a_tower_with_other_tensors(bundle: Path, name: str, where: str, lost: str) -> None:
    def change(made: Manifest) -> None:
        made["components"][name][where][0]["name"] = "other"
        del made["model"]["image_conditioning"]

    edit(bundle, change)
    refused(BadManifest, bundle, f"components.{name}.{where}", lost)


# -- tensors ------------------------------------------------------------------------------------


def test_tensors_are_read_and_widened(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    halves = np.array([[1.5, -2.0, 65504.0]], "<f2")
    file.write_bytes(
        tiny.safetensors(
            {
                "f16": ("F16", [1, 3], halves.tobytes()),
                "bf16": ("BF16", [2], struct.pack("<2H", 0x3F80, 0xC040)),
                "f32": ("F32", [], struct.pack("<f", 0.1)),
            }
        )
    )
    found = read_tensors(file, ["bf16", "f32", "f16"])
    assert found["bf16"].tolist() == [1.0, -3.0]
    assert found["f32"] == np.float32(0.1)
    assert np.array_equal(found["f16"], halves.astype(np.float32))
    assert {v.dtype for v in found.values()} == {np.dtype("float32")}
    assert found["f32"].shape == ()


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(tiny.WEIGHTS)
    with pytest.raises(CorruptPart, match="no tensor 'b'; it has 3 others") as caught:
        read_tensors(tmp_path / "w.safetensors", ["a.bias", "b"])
    assert "sdengine export" in caught.value.hint
