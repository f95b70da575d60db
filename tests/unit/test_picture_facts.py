"""What `inspect` says of a picture file: mark, seed, model, request, text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sdengine.engine import images, watermark
from sdengine.engine.describe import picture_facts, picture_lines
from sdengine.engine.errors import RequestError, StorageError
from sdengine.engine.metadata import Metadata

SAID = Metadata(
    "a fox\nSteps: 25, Seed: 7, Size: 320x256",
    {"prompt": "a föx", "seed": 7},
    {"model": "emoji", "backend": "openvino"},
)


@pytest.fixture
def plain() -> np.ndarray:
    return np.full((256, 320, 3), 90, np.uint8)


def saved(folder, pixels, metadata=SAID, name="a.png"):
    return images.save(Image.fromarray(pixels), folder / name, metadata)


def test_all_is_told(tmp_path, plain):
    found = picture_facts(saved(tmp_path, watermark.encode(plain)))
    assert json.loads(json.dumps(found)) == found
    assert (found["height"], found["width"]) == (256, 320)
    bits = "".join(f"{letter:08b}" for letter in b"SDV2")
    assert found["mark"] == {"text": "SDV2", "bits": bits, "agreeing": 32, "of": 32}
    assert found["request"] == SAID.request
    assert found["about"] == SAID.about
    assert found["parameters"] == SAID.parameters


def test_in_lines(tmp_path, plain):
    lines = list(picture_lines(saved(tmp_path, watermark.encode(plain))))
    assert lines[0] == "a.png: 320 x 256 pixels"
    rows = [line.split(maxsplit=1) for line in lines[1 : lines.index("")]]
    assert dict(rows) == {
        "mark": "SDV2 (32 of 32 bits are those of SDV2)",
        "seed": "7",
        "model": "emoji",
        "backend": "openvino",
    }
    assert SAID.parameters in lines
    assert json.loads(lines[-1]) == {"request": {"prompt": "a föx", "seed": 7}}


def test_unmarked(tmp_path, plain):
    path = saved(tmp_path, plain, Metadata())
    assert picture_facts(path)["mark"]["text"] is None
    assert picture_facts(path)["request"] is None
    text = "\n".join(picture_lines(path))
    assert (
        "none found (19 of 32 bits are those of SDV2)" in text
    )  # all bits read 0; SDV2 has 13 ones
    assert text.endswith("this picture does not say how it was made")


def test_too_small_for_a_mark(tmp_path, plain):
    path = saved(tmp_path, plain[:200])
    assert picture_facts(path)["mark"] is None
    assert "too small to hold one" in "\n".join(picture_lines(path))


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_other_formats(tmp_path, plain, name):
    found = picture_facts(saved(tmp_path, watermark.encode(plain), name=name))
    assert found["request"] == SAID.request
    assert len(found["mark"]["bits"]) == 32


def test_not_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(RequestError, match=r"a\.png") as caught:
        picture_facts(tmp_path / "a.png")
    assert "PNG" in caught.value.hint
    with pytest.raises(StorageError, match=r"b\.png"):
        picture_facts(tmp_path / "b.png")
