"""Every task on every backend: one request, one picture. README's table comes from here.

Tiny random models in float32, a step or two; torch is the yardstick. With SDENGINE_WRITE_TABLES=1 a
whole run of this file writes what it measured into tasks_on_backends.json and README.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine import api, backends

RECORD = Path(__file__).with_name("tasks_on_backends.json")
README = Path(__file__).parents[2] / "README.md"
MARKERS = ("<!-- tasks on backends -->\n", "<!-- end of tasks on backends -->\n")
LEAST = 45.0  # dB
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "torch"}
# row -> the checkpoint's variant, what is given beside the prompt
TASKS = {
    "text to picture": ("base", {}),
    "picture to picture": ("base", {"image": 128, "strength": 0.7}),
    "inpainting, any 4-channel model": ("base", {"image": 128, "mask": 128}),
    "inpainting, 9-channel model": ("inpainting", {"image": 128, "mask": 128}),
    "depth to picture": ("depth", {"image": 128, "strength": 0.7}),
    "x4 upscaling": ("x4-upscaler", {"image": 32}),
    "variations and mixing, unCLIP-H": ("unclip-h", {"images": 2}),
    "variations and mixing, unCLIP-L": ("unclip-l", {"images": 2}),
}
ENGINES = [
    pytest.mark.export,
    pytest.mark.ov,
    pytest.mark.ort,
    pytest.mark.slow,
]


def picture(side: int, seed: int) -> Image.Image:
    """Soft blobs of colour: what a resize or an encoder does to them is no rounding lottery."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


def right_half(side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 2, 0, side, side))
    return mask


def request(row: str) -> dict[str, object]:
    given = dict(TASKS[row][1])
    asked = {"prompt": "a red fox", "steps": 2, "seed": 5, "watermark": False}
    if "images" in given:
        asked |= {"image": [picture(128, k) for k in range(given.pop("images"))]}
        asked |= {"weights": (0.6, 0.4), "width": 128, "height": 128}
    if "image" in given:
        asked["image"] = picture(given.pop("image"), 1)
    if "mask" in given:
        asked["mask"] = right_half(given.pop("mask"))
    return asked | given


def psnr(a: Image.Image, b: Image.Image) -> float:
    """dB between two pictures of 8 bits; infinite where they are equal."""
    square = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return float("inf") if square == 0 else float(10 * np.log10(255**2 / square))


@pytest.fixture(scope="module")
def measured():
    """row -> backend -> dB, filled by the tests."""
    return {}


@pytest.fixture(scope="module")
def drawn(variant_bundle):
    """`drawn(row)`: backend -> the picture. In CI all three must be here."""

    def draw(row):
        bundle = variant_bundle(TASKS[row][0])
        pictures = {}
        for name in TITLES:
            probe = backends.get(name).probe()
            if not probe.ok and not os.environ.get("CI"):
                pytest.skip(f"{name} cannot run here: {probe.reason}")
            with api.load(bundle, backend=name, precision="f32", threads=1) as pipe:
                pictures[name] = pipe(**request(row)).image
        return pictures

    return draw


@pytest.mark.parametrize("row", [pytest.param(row, marks=ENGINES) for row in TASKS])
def test_the_backends_agree(drawn, measured, row):
    pictures = drawn(row)
    yardstick = pictures["torch"]
    assert yardstick.size == (128, 128)
    assert np.asarray(yardstick, float).std() > 5  # something is on it
    found = {name: psnr(image, yardstick) for name, image in pictures.items() if name != "torch"}
    assert min(found.values()) >= LEAST, found
    measured[row] = {name: round(min(db, 99.9), 1) for name, db in found.items()}
    if os.environ.get("SDENGINE_WRITE_TABLES") == "1" and list(measured) == list(TASKS):
        RECORD.write_text(json.dumps(measured, indent=2) + "\n")
        before, _, after = split(README.read_text(encoding="utf-8"))
        README.write_text(before + table(measured) + after, encoding="utf-8")


# What README says of it


def split(text: str) -> tuple[str, str, str]:
    """README before the table, the table, what follows; the markers stay outside of it."""
    first, last = MARKERS
    assert text.count(first) == text.count(last) == 1
    before, rest = text.split(first)
    inside, after = rest.split(last)
    return before + first, inside, last + after


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"| task | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for row, figures in found.items():
        cells = ["reference" if name == "torch" else cell(figures[name]) for name in TITLES]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(db: float) -> str:
    return "equal" if db == 99.9 else f"{db:.1f} dB"


def test_readme_says_what_was_measured():
    found = json.loads(RECORD.read_text())
    assert list(found) == list(TASKS)
    assert set(TITLES) == set(backends.NAMES) - {"ipex"}, "it runs torch's networks"
    for figures in found.values():
        assert set(figures) == set(TITLES) - {"torch"}
        assert min(figures.values()) >= LEAST
    _, inside, _ = split(README.read_text(encoding="utf-8"))
    assert inside == table(found)
