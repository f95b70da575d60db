"""What a picture says about itself: the text that AUTOMATIC1111's tools read, and our own request.

PNG holds both as text chunks: `parameters`, and `sdengine` with the JSON `{"request": {...},
"about": {...}}`. JPEG and WebP hold them in EXIF: `parameters` as UserComment, and
`{"sdengine": {...}}` as ImageDescription.

source      AUTOMATIC1111/stable-diffusion-webui: what its "PNG Info" tab reads
checked by  tests/unit/test_metadata.py (a parser written from those rules; exact round trips)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from . import solvers
from .errors import RequestError, StorageError

PARAMETERS, OURS = "parameters", "sdengine"

# EXIF: tag numbers, and the mark of a comment in UTF-16. The standard leaves the byte order of such
# a comment open; the tools that we write for take big endian.
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286
TEXT, LONG, UNDEFINED = 2, 4, 7  # TIFF's types of values
TIFF_HEAD = 8  # bytes before the first directory
UNICODE, ASCII = b"UNICODE\0", b"ASCII\0\0\0"

# Our schedules that AUTOMATIC1111 has too, under its names. The others go by ours, marked as such:
# what it calls "Uniform" is not what we do.
SCHEDULE_TITLES = {"karras": "Karras", "linspace": "Uniform", "leading": "DDIM"}


@dataclass(frozen=True)
class Metadata:
    """What is written into a file, and read from one.

    parameters   the text; "" when there is none
    request      every field of the request that makes this picture again; None when it is not ours
    about        model, bundle, backend, version, ...: what the request does not say
    """

    parameters: str = ""
    request: Mapping[str, Any] | None = None
    about: Mapping[str, str] = field(default_factory=dict)


def describe(
    request: Mapping[str, Any], about: Mapping[str, str], size: tuple[int, int]
) -> Metadata:
    """From a completed request as a dictionary, and what is known about the run.

    size     (width, height) of the picture
    about    of these the text shows `model`, `model_sha256` (the first ten digits, as others do)
             and `version`; the JSON holds all
    """
    schedule = request["schedule"]
    fields = {
        "Steps": request["steps"],
        "Sampler": solvers.find(request["sampler"]).title,
        "Schedule type": SCHEDULE_TITLES.get(schedule, f"sdengine {schedule}"),
        "CFG scale": f"{request['guidance']:.10g}",
        "Seed": request["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": about["model_sha256"][:10] if "model_sha256" in about else None,
        "Model": about.get("model"),
        "Denoising strength": _shown(request.get("strength")),
        "Eta": f"{request['eta']:.10g}" if solvers.find(request["sampler"]).eta else None,
        "Version": f"sdengine {about['version']}" if "version" in about else None,
    }
    text = parameters_text(request["prompt"], request["negative_prompt"], fields)
    return Metadata(text, dict(request), dict(about))


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.10g}"


def parameters_text(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """The prompt, the negative prompt, and a last line `Steps: 25, Sampler: DPM++ 2M, ...`.

    fields   in the order in which they are shown; None leaves one out. Readers want at least three;
             the usual ones are Steps, Sampler, CFG scale, Seed, Size (`512x768`, width first)

    The text is for people and foreign tools: a prompt that has a line beginning with
    "Negative prompt:" cannot be told from one that has a negative prompt. The JSON can.
    """
    line = ", ".join(f"{key}: {_quoted(v)}" for key, v in fields.items() if v is not None)
    negative = f"Negative prompt: {negative_prompt}" if negative_prompt else ""
    return "\n".join(part for part in (prompt, negative, line) if part)


def _quoted(value: object) -> str:
    """As it is, or as a JSON string where a reader would cut it in two or take its quotes off."""
    text = str(value)
    plain = text and not set(text) & set(',:\n\r"') and text == text.strip()
    return text if plain else json.dumps(text, ensure_ascii=False)


def png_info(metadata: Metadata) -> PngInfo:
    """Text chunks: tEXt where Latin-1 is enough, else iTXt (UTF-8)."""
    info = PngInfo()
    if metadata.parameters:
        info.add_text(PARAMETERS, _well_formed(metadata.parameters))
    if metadata.request is not None:
        info.add_text(OURS, _json(_ours(metadata)))
    return info


def exif(metadata: Metadata) -> bytes:
    """The EXIF block of a JPEG or WebP file; empty when there is nothing to say.

    Written by hand: Pillow gives a UserComment the type BYTE, and readers want UNDEFINED.
    """
    entries: list[tuple[int, int, bytes]] = []
    inner = b""
    if metadata.request is not None:
        text = _json({OURS: _ours(metadata)}).encode() + b"\0"
        entries.append((IMAGE_DESCRIPTION, TEXT, text))
    if metadata.parameters:
        comment = UNICODE + _well_formed(metadata.parameters).encode("utf-16-be")
        start = TIFF_HEAD + len(_directory(TIFF_HEAD, [*entries, (EXIF_IFD, LONG, bytes(4))]))
        entries.append((EXIF_IFD, LONG, struct.pack(">I", start)))
        inner = _directory(start, [(USER_COMMENT, UNDEFINED, comment)])
    if not entries:
        return b""
    head = struct.pack(">2sHI", b"MM", 42, TIFF_HEAD)
    return b"Exif\0\0" + head + _directory(TIFF_HEAD, entries) + inner


def _directory(at: int, entries: Sequence[tuple[int, int, bytes]]) -> bytes:
    """A TIFF directory of (tag, type, value) that will lie at offset `at`, its values behind it."""
    rows, values = struct.pack(">H", len(entries)), b""
    behind = at + len(rows) + 12 * len(entries) + 4
    for tag, kind, value in entries:
        count = len(value) // 4 if kind == LONG else len(value)
        place = value.ljust(4, b"\0")  # up to four bytes stand in the row itself
        if len(value) > 4:
            place = struct.pack(">I", behind + len(values))
            values += value + bytes(len(value) % 2)  # values begin at even offsets
        rows += struct.pack(">HHI4s", tag, kind, count, place)
    return rows + bytes(4) + values


def read_metadata(path: Path, content: BinaryIO | None = None) -> Metadata:
    """What the picture at `path` says; an empty Metadata when it says nothing.

    content  the file's bytes, where they are at hand; `path` is then its name in messages alone
    raises   StorageError when the file cannot be read, RequestError when it is not a picture or
             holds a damaged `sdengine` entry
    """
    try:
        with Image.open(path if content is None else content) as image:
            parameters, ours = _png_texts(image) if image.format == "PNG" else _exif_texts(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RequestError(
            f"not a picture that can be read: {path}: {error}",
            hint="give a PNG, JPEG or WebP file",
        ) from None
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check the path and that you may read the file",
        ) from None
    return Metadata(parameters, *([] if ours is None else _parsed(path, ours)))


def _png_texts(image: Image.Image) -> tuple[str, str | None]:
    image.load()  # other programs write text chunks behind the pixels
    return str(image.info.get(PARAMETERS, "")), image.info.get(OURS)


def _exif_texts(image: Image.Image) -> tuple[str, str | None]:
    block = image.getexif()
    comment = block.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    parameters = ""
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        parameters = comment.removeprefix(UNICODE).decode("utf-16-be", "replace")
    if isinstance(comment, bytes) and comment.startswith(ASCII):
        parameters = comment.removeprefix(ASCII).decode("latin-1")
    # Pillow gives a text tag's bytes as Latin-1; ours are UTF-8. Other descriptions are not for us.
    description = str(block.get(IMAGE_DESCRIPTION, "")).encode("latin-1", "replace")
    ours = description.startswith(f'{{"{OURS}":'.encode())
    return parameters, description.decode("utf-8", "replace") if ours else None


def _ours(metadata: Metadata) -> dict[str, Any]:
    return {"request": metadata.request, "about": metadata.about}


def _json(value: Mapping[str, Any]) -> str:
    return _well_formed(json.dumps(value, ensure_ascii=False))


def _parsed(path: Path, text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """request, about."""
    try:
        entry = json.loads(text)
        entry = entry.get(OURS, entry)
        request, about = dict(entry["request"]), dict(entry["about"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RequestError(
            f"the {OURS!r} entry of {path} is damaged: expected a JSON object with a request, "
            f"found {len(text)} characters that begin {text[:40]!r}",
            hint=f"read the file's {PARAMETERS!r} text with another tool, or use an intact copy",
        ) from None
    return request, about


def _well_formed(text: str) -> str:
    """Half a surrogate pair (a name in a broken encoding) becomes U+FFFD; the rest is kept."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
