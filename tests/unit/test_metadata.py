"""The text that AUTOMATIC1111's tools read, and the JSON of the request, through real files."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdengine.engine import images
from sdengine.engine.errors import RequestError, StorageError
from sdengine.engine.metadata import Metadata, describe, parameters_text, read_metadata

REQUEST = {
    "prompt": "a fox, in the snow",
    "negative_prompt": "blurry",
    "width": 512,
    "height": 768,
    "steps": 25,
    "guidance": 5.0,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "eta": 0.0,
    "seed": 7,
    "count": 1,
    "batch_size": 1,
}
SIZE = (512, 768)
ABOUT = {
    "model": "sd21-base",
    "model_sha256": "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36",
    "backend": "openvino",
    "version": "0.1.0",
}
SUFFIXES = [".png", ".jpg", ".webp"]


def write(folder: Path, suffix: str, metadata: Metadata) -> Path:
    return images.save(Image.new("RGB", (8, 8), "teal"), folder / f"a{suffix}", metadata)


def parsed(text: str) -> dict[str, str]:
    """A reader of the format, from its published rules.

    The last line is a list of `key: value` parted by commas, if there are at least three of them; a
    value that holds a comma, a colon or a line end is a JSON string. The lines before it are the
    prompt until one begins with "Negative prompt:", which begins the negative prompt. Lines are
    stripped.
    """
    *lines, last = text.strip().split("\n")
    found: dict[str, str] = {}
    place, decoder = 0, json.JSONDecoder()
    while match := re.compile(r"\s*(\w[\w \-/]+):\s*").match(last, place):
        place = match.end()
        if last.startswith('"', place):
            value, place = decoder.raw_decode(last, place)
        else:
            end = last.find(",", place)
            end = len(last) if end < 0 else end
            value, place = last[place:end], end
        assert last[place : place + 1] in ("", ","), f"junk behind {match[1]}: {last[place:]}"
        found[match[1]] = value
        place += 1
    assert place > len(last) - 1, f"not read: {last[place:]}"
    assert len(found) >= 3, "too few pairs: a reader would take the line for a part of the prompt"
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            target, line = negative, line.removeprefix("Negative prompt:").strip()
        target.append(line)
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), **found}


def test_the_whole_text():
    assert describe(REQUEST, ABOUT, SIZE).parameters == (
        "a fox, in the snow\n"
        "Negative prompt: blurry\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 7, "
        "Size: 512x768, Model hash: 88ecb78256, Model: sd21-base, Version: sdengine 0.1.0"
    )


def test_what_is_not_there_is_left_out():
    request = {**REQUEST, "prompt": "", "negative_prompt": "", "guidance": 7.25}
    request |= {"sampler": "ddim", "schedule": "trailing", "eta": 0.5, "seed": 0}
    assert describe(request, {}, SIZE).parameters == (
        "Steps: 25, Sampler: DDIM, Schedule type: sdengine trailing, CFG scale: 7.25, Seed: 0, "
        "Size: 512x768, Eta: 0.5"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a fox, 'quoted' \"twice\" \\ {json: [1, 2]}",
        "two\nlines, and a third\n\nline",
        "Steps: 3, Sampler: none, Seed: 4, Size: 1x1",
        "a list\nSteps: 3, Sampler: none, Seed: 4",
        "caf\u00e9, \u00fc\u00ff",
        "一只狐狸 🦊 \u201cfox\u201d",
        "tab\tbell\x07nul\0end",
        "Negative prompt: in the prompt",
        "x" * 10_000,
    ],
    ids=lambda p: ascii(p[:20]),
)
def test_round_trip(tmp_path, suffix, prompt):
    metadata = describe({**REQUEST, "prompt": prompt, "negative_prompt": prompt[::-1]}, ABOUT, SIZE)
    assert read_metadata(write(tmp_path, suffix, metadata)) == metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("backend", ["odd", "even"])
def test_foreign_reader(tmp_path, suffix, backend):
    """The file, opened as the others do it, gives text that their rules take apart again."""
    about = {**ABOUT, "model": 'fox: "red", v2', "backend": backend}
    request = {
        **REQUEST,
        "prompt": 'Steps: 9, Seed: 1, Size: 2x2\n狐狸, "x"',
        "schedule": "leading",
    }
    with Image.open(write(tmp_path, suffix, describe(request, about, SIZE))) as image:
        text = image.info["parameters"] if suffix == ".png" else exif_comment(image)
    assert parsed(text) == {
        "Prompt": request["prompt"],
        "Negative prompt": "blurry",
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "Schedule type": "DDIM",
        "CFG scale": "5",
        "Seed": "7",
        "Size": "512x768",
        "Model hash": "88ecb78256",
        "Model": 'fox: "red", v2',
        "Version": "sdengine 0.1.0",
    }


def exif_comment(image: Image.Image) -> str:
    """UserComment taken out of the raw TIFF block by hand; UTF-16 big endian whatever the block is.

    source      EXIF 2.3: IFD0 entry 0x8769 points at the Exif IFD, its entry 0x9286 at the comment
    """
    block = image.info["exif"].removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[block[:2]]

    def entries(at: int) -> dict[int, tuple[int, int, int]]:
        (count,) = struct.unpack_from(f"{order}H", block, at)
        rows = (struct.unpack_from(f"{order}HHII", block, at + 2 + 12 * i) for i in range(count))
        return {tag: (kind, size, value) for tag, kind, size, value in rows}

    (first,) = struct.unpack_from(f"{order}I", block, 4)
    outer = entries(first)
    kind, size, at = entries(outer[0x8769][2])[0x9286]
    assert kind == 7, "the standard's type of a comment is UNDEFINED"
    assert {at % 2, outer[0x8769][2] % 2, outer[0x010E][2] % 2} == {0}, (
        "values begin at even places"
    )
    comment = block[at : at + size]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def chunks(path: Path) -> list[tuple[bytes, bytes]]:
    data, at, found = path.read_bytes(), 8, []
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + size
    return found


def test_chunks_of_a_png(tmp_path):
    """tEXt where Latin-1 is enough, iTXt where not, both before the pixels."""
    plain = chunks(write(tmp_path, ".png", describe(REQUEST, ABOUT, SIZE)))
    assert [kind for kind, _ in plain] == [b"IHDR", b"tEXt", b"tEXt", b"IDAT", b"IEND"]
    assert plain[1][1].startswith(b"parameters\0a fox, in the snow\nNegative prompt: blurry\nSteps")
    key, text = plain[2][1].split(b"\0")
    assert key == b"sdengine"
    assert json.loads(text) == {"request": REQUEST, "about": ABOUT}
    wide = chunks(write(tmp_path, ".png", describe({**REQUEST, "prompt": "狐狸"}, ABOUT, SIZE)))
    assert [kind for kind, _ in wide] == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
    assert wide[1][1].startswith(b"parameters\0\0\0\0\0" + "狐狸".encode())


ORDINARY = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


@settings(max_examples=200, deadline=None)
@given(prompt=ORDINARY, negative=ORDINARY, model=ORDINARY)
@example(prompt="", negative="", model='"')
@example(prompt="a", negative="", model=" , ")
@example(prompt="a", negative="", model='he said "no"')
def test_any_values_are_read_back(prompt, negative, model):
    fields = {"Steps": 1, "Model": model, "Seed": 2, "Size": "8x8"}
    got = parsed(parameters_text(prompt, negative, fields))
    assert got.pop("Steps") == "1"
    if not prompt.lstrip().startswith("Negative prompt:"):
        assert got["Prompt"] == prompt.strip()
        assert got["Negative prompt"] == negative.strip()
    assert got["Model"] == model
    assert got["Seed"] == "2"


def test_half_a_surrogate_pair_does_not_lose_the_picture(tmp_path):
    for suffix in SUFFIXES:
        path = write(tmp_path, suffix, describe(REQUEST, {**ABOUT, "model": "m\udcff"}, SIZE))
        assert read_metadata(path).about["model"] == "m\ufffd"
        assert "Model: m\ufffd" in read_metadata(path).parameters


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_that_says_nothing(tmp_path, suffix):
    path = tmp_path / f"plain{suffix}"
    Image.new("RGB", (8, 8)).save(path)
    assert read_metadata(path) == Metadata("", None, {})


def test_pictures_of_others(tmp_path):
    """A description that is not ours, an ASCII comment, text behind the pixels."""
    exif = Image.Exif()
    exif[0x010E] = "{a fox}"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a fox\nSteps: 1"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg") == Metadata("a fox\nSteps: 1")
    info = PngInfo()
    info.add(b"tEXt", b"parameters\0late", after_idat=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_metadata(tmp_path / "a.png") == Metadata("late")


@pytest.mark.parametrize(
    "entry",
    ["{", "[]", '{"request": 1, "about": {}}', '"x"', '{"request": {}}', "[" * 20_000],
    ids=lambda entry: entry[:20],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_entry_is_refused(tmp_path, entry, suffix):
    path, info, exif = tmp_path / f"a{suffix}", PngInfo(), Image.Exif()
    info.add_text("sdengine", entry)
    exif[0x010E] = f'{{"sdengine": {entry}}}'
    Image.new("RGB", (8, 8)).save(path, pnginfo=info, exif=exif)
    with pytest.raises(RequestError, match=r"'sdengine' entry of .* is damaged") as caught:
        read_metadata(path)
    assert "intact copy" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match="not a picture") as caught:
        read_metadata(tmp_path / "a.png")
    assert "PNG, JPEG or WebP" in caught.value.hint


def test_half_a_picture(tmp_path):
    path = write(tmp_path, ".png", describe(REQUEST, ABOUT, SIZE))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises((RequestError, StorageError), match=str(path)) as caught:
        read_metadata(path)
    assert caught.value.hint


def test_no_such_file(tmp_path):
    with pytest.raises(StorageError, match="No such file") as caught:
        read_metadata(tmp_path / "gone.png")
    assert "check the path" in caught.value.hint
