"""Arrays to picture files: uint8 pixels, sizes that are not multiples, safe and atomic saving.

checked by  tests/golden/test_images.py (the reference's pixels), tests/unit/test_images.py
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import NumericsError, RequestError, StorageError
from .metadata import Metadata, exif, png_info
from .ports import Floats

Pixels = NDArray[np.uint8]
EMPTY = Metadata()

# suffix -> Pillow's name of the format and its options
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
JPEG_EXIF_BYTES = 65_533  # a JPEG marker counts its bytes in 16 bits, two of which are the count

# errno -> (what is wrong, what to do)
TROUBLE: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on the disk", "free some space, or save to another disk"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, or save to another disk"),
    errno.EFBIG: ("the file is larger than allowed", "raise the limit (`ulimit -f`)"),
    errno.EACCES: ("no permission to write there", "save to a folder that you may write"),
    errno.EPERM: ("no permission to write there", "save to a folder that you may write"),
    errno.EROFS: ("the disk is read-only", "save to another disk"),
    errno.EEXIST: ("a file is where a folder should be", "remove the file or name another folder"),
    errno.ENOTDIR: ("a file is where a folder should be", "remove the file or name another folder"),
    errno.EISDIR: ("a folder is where the file should be", "give the name of a file"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter file name"),
}


def to_uint8(picture: Floats) -> Pixels:
    """float32 [3, H, W] in -1..1 -> uint8 [H, W, 3], the way the reference does it.

    Values outside are clamped. Truncated, not rounded: reference-spec 4.

    raises   NumericsError for NaN or infinity, which would become black
    """
    bad = picture.size - int(np.count_nonzero(np.isfinite(picture)))
    if bad:
        raise NumericsError(
            f"the decoded picture holds NaN or infinity in {bad} of {picture.size} values",
            hint="run it in float32; if that fails too, check the bundle with `sdengine inspect "
            "--verify` and lower the guidance scale",
        )
    unit = np.clip((picture + np.float32(1)) / np.float32(2), 0, 1)
    return np.ascontiguousarray((unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 0))


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest multiples that hold the size, both in pixels: what a model is run at."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def crop_centre(pixels: Pixels, height: int, width: int) -> Pixels:
    """uint8 [H, W, 3] -> [height, width, 3]; of an odd rest, less goes at the top and left.

    The centre, because a model composes its picture for the whole canvas: what is cut off is half
    as deep on each side, and a centred subject stays centred.
    """
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    assert min(top, left) >= 0, f"cannot crop {pixels.shape} to {height} x {width}"
    return pixels[top : top + height, left : left + width]


def check_output(path: Path, metadata: Metadata = EMPTY) -> None:
    """Whether a picture can be written to `path`; ask before the run, not after. Makes the folder.

    raises   RequestError for a suffix that is none of FORMATS, or when the metadata is too long for
             the format; StorageError when the folder cannot be made or written
    """
    _encode_options(path, metadata)
    _make_folder(path.parent)
    probe = path.parent / _temporary_name()
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise storage_error(error, path.parent) from error
    if path.is_dir():
        raise storage_error(IsADirectoryError(errno.EISDIR, "is a directory"), path)


def save(image: Image.Image, path: Path, metadata: Metadata = EMPTY) -> Path:
    """An RGB image to PNG, JPEG or WebP by suffix; a file of that name is replaced.

    All or nothing: the file is written beside its place and renamed. A missing folder is made.

    raises   as check_output
    """
    data = encode(image, path, metadata)
    _make_folder(path.parent)
    _write(data, path)
    return path


def save_new(
    image: Image.Image, folder: Path, stem: str, suffix: str, metadata: Metadata = EMPTY
) -> Path:
    """Save under a free name (unique_path) and return it; raises as check_output."""
    data = encode(image, folder / f"{stem}{suffix}", metadata)
    path = unique_path(folder, stem, suffix)
    try:
        _write(data, path)
    except BaseException:
        path.unlink(missing_ok=True)  # the empty file that held the name
        raise
    return path


def unique_path(folder: Path, stem: str, suffix: str) -> Path:
    """`stem.png`, `stem-2.png`, ...: the first that is free, claimed by an empty file.

    The claim is atomic, so two processes never get the same name. A missing folder is made.
    Raises StorageError.
    """
    _make_folder(folder)
    number = 1
    while True:
        path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
        try:
            path.touch(exist_ok=False)  # O_CREAT and O_EXCL
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise storage_error(error, path) from error


def encode(image: Image.Image, path: Path, metadata: Metadata = EMPTY) -> bytes:
    """An RGB image as a file's bytes; `path` says the format by its suffix. Raises RequestError."""
    kind, options = _encode_options(path, metadata)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_options(path: Path, metadata: Metadata) -> tuple[str, dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise RequestError(
            f"cannot save {path.name!r}: {suffix or 'no suffix'} is not a known picture format",
            hint=f"end the name in one of: {', '.join(FORMATS)}",
        )
    kind, options = FORMATS[suffix]
    if kind == "PNG":
        return kind, {**options, "pnginfo": png_info(metadata)}
    block = exif(metadata)
    if kind == "JPEG" and len(block) > JPEG_EXIF_BYTES:
        raise RequestError(
            f"the prompt is too long for a JPEG file: its metadata takes {len(block)} bytes, "
            f"at most {JPEG_EXIF_BYTES} fit",
            hint="save as .png or .webp, or shorten the prompt",
        )
    return kind, {**options, "exif": block}


def write_file(data: bytes, path: Path) -> Path:
    """Any bytes, written as `save` writes a picture. Raises StorageError."""
    _make_folder(path.parent)
    _write(data, path)
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


def _write(data: bytes, path: Path) -> None:
    """All of it or nothing, whatever interrupts."""
    temporary = path.parent / _temporary_name()
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary_name() -> str:
    return f".sdengine-{secrets.token_hex(8)}.part"


def storage_error(error: OSError, path: Path) -> StorageError:
    """What an OSError of writing to `path` means, and what to do."""
    other = (error.strerror or str(error), "check the path, or save to another folder")
    what, cure = TROUBLE.get(error.errno or 0, other)
    return StorageError(f"cannot save to {path}: {what}", hint=cure)
