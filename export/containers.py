"""Files that hold tensors: safetensors, mapped into memory; torch pickles, of which nothing runs.

`open_container` looks at the content, never at the file's name, and reads headers only.

checked by  tests/unit/checkpoint/test_files.py, tests/unit/checkpoint/test_pickle.py
"""

from __future__ import annotations

import difflib
import json
import math
import mmap
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.errors import NotACheckpoint, StorageError

Bytes = NDArray[np.uint8]
FileKind = Literal["safetensors", "ckpt"]

# Bytes of one element. The first three may hold weights; the others occur in counters and masks.
ITEM_BYTES: Mapping[str, int] = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
TORCH: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_REFETCH = "fetch the file again and compare its size and SHA-256 with the publisher's"
EXPECTED = "give a .safetensors or .ckpt file, a diffusers folder, or a bundle"


@dataclass(frozen=True)
class TensorRef:
    """One tensor, not read yet.

    dtype       as safetensors spells it: "F16", "BF16", "F32"
    read        its bytes, little endian, C order, as a flat uint8 array; mapped where possible
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def numpy_bytes(self) -> memoryview:
        """The bytes, little endian, C order."""
        return self.read().data

    def torch(self) -> Tensor:
        """The tensor; it shares the mapped pages, and a write to it never reaches the file."""
        raw = self.read()
        if raw.size == 0:
            return torch.empty(self.shape, dtype=TORCH[self.dtype])
        if raw.ctypes.data % ITEM_BYTES[self.dtype]:
            raw = raw.copy()  # a header of odd length leaves the data unaligned
        return torch.frombuffer(raw, dtype=TORCH[self.dtype]).reshape(self.shape)

    def named(self, name: str, shape: tuple[int, ...] | None = None) -> TensorRef:
        """The same bytes under another name, or in another shape."""
        return replace(self, name=name, shape=self.shape if shape is None else shape)


def joined(name: str, parts: list[TensorRef]) -> TensorRef:
    """Parts of one dtype, one below the other along the first axis."""
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return TensorRef(name, parts[0].dtype, shape, lambda: np.concatenate([p.read() for p in parts]))


def transposed(ref: TensorRef) -> TensorRef:
    """A matrix with its axes exchanged."""

    def read() -> Bytes:
        items = ref.read().reshape(*ref.shape, ITEM_BYTES[ref.dtype])
        return np.ascontiguousarray(items.transpose(1, 0, 2)).reshape(-1)

    return replace(ref, shape=ref.shape[::-1], read=read)


@dataclass(frozen=True)
class Container:
    """What one file holds. `metadata` are the texts of a safetensors header."""

    path: Path
    kind: FileKind
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


def open_container(path: Path) -> Container:
    """The tensors of a file.

    raises      NotACheckpoint when it is not a safetensors file or a torch pickle, or is truncated
                UnsafeCheckpoint for a pickle that asks for more than tensors
                StorageError when it cannot be read
    """
    if file_kind(path) == "safetensors":
        return _safetensors(path)
    from .pickles import read_pickle

    return Container(path, "ckpt", read_pickle(path), {})


# -- what is it? -------------------------------------------------------------------------------

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WebP picture or another RIFF file"),
    (b"GGUF", "a GGUF file"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89HDF", "an HDF5 file"),
)
_LFS = b"version https://git-lfs"


def file_kind(path: Path) -> FileKind:
    """By content. Raises NotACheckpoint, StorageError."""
    head, size = _head(path)
    if size == 0:
        raise NotACheckpoint(f"{path} is empty", hint=_REFETCH)
    # First, because a header's length may begin with the bytes of another format.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if _is_pickle(head):
        return "ckpt"
    _refuse_foreign(path, head, size)
    if path.suffix == ".safetensors":
        return "safetensors"  # its reader says what is wrong with the header
    raise NotACheckpoint(
        f"{path} is neither a safetensors file nor a torch pickle (it begins with {head[:8]!r})",
        hint=EXPECTED,
    )


def _refuse_foreign(path: Path, head: bytes, size: int) -> None:
    if head.startswith(_LFS):
        raise NotACheckpoint(
            f"{path} is a Git LFS pointer of {size} bytes, not the model itself",
            hint="run `git lfs install` and `git lfs pull` in its repository, then try again",
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise NotACheckpoint(
            f"{path} is a web page that was saved under the name of a model",
            hint="download the file itself; some publishers ask for a login and a licence first",
        )
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise NotACheckpoint(f"{path} is {what}, not a model file", hint=EXPECTED)


def _is_pickle(head: bytes) -> bool:
    """A zip archive, or a bare pickle of protocol 2 to 5: torch.save writes nothing older."""
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def _head(path: Path) -> tuple[bytes, int]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never ends
            raise NotACheckpoint(f"{path} is no regular file", hint=EXPECTED)
        with open(path, "rb") as file:
            return file.read(512), status.st_size
    except FileNotFoundError as error:
        raise NotACheckpoint(f"{path} does not exist", hint=_near(path)) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot read {path}: {error.strerror}",
        hint="check the permissions of the file and of the folders above it",
    )


def _near(path: Path) -> str:
    """What lies in the folder under a similar name."""
    try:
        names = sorted(p.name for p in path.absolute().parent.iterdir())
    except OSError:
        return f"the folder {path.absolute().parent} cannot be listed either; check the path"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    beside = f"; in that folder: {', '.join(near)}" if near else ""
    return f"check the path{beside}"


# -- safetensors -------------------------------------------------------------------------------


def _safetensors(path: Path) -> Container:
    """source: the format as the safetensors README gives it: u64 header length, JSON, data."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER:
                raise NotACheckpoint(
                    f"{path} is not a safetensors file: its header would have {length} bytes "
                    f"(at most {_MAX_HEADER}; the file has {size})",
                    hint=_REFETCH,
                )
            if 8 + length > size:
                raise _truncated(path, f"its header alone has {length} bytes", size)
            raw = file.read(length)
            # Copy on write: tensors are writable, as torch wants them, and the file never changes.
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except OSError as error:
        raise cannot_read(path, error) from error
    header = _json(path, raw)
    metadata = header.pop("__metadata__", {})
    data = data[8 + length :]
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_places(path, entries, data.size, size)
    tensors = {
        name: TensorRef(name, e.dtype, e.shape, lambda e=e: data[e.begin : e.end])  # type: ignore[misc]
        for name, e in entries.items()
    }
    texts = metadata if isinstance(metadata, dict) else {}
    return Container(path, "safetensors", tensors, {str(k): str(v) for k, v in texts.items()})


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice")
        return made

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise NotACheckpoint(
            f"{path} is not a safetensors file: its header is not sound JSON ({error})",
            hint=_REFETCH,
        ) from error
    if not isinstance(header, dict):
        raise NotACheckpoint(f"{path} is not a safetensors file: no JSON object", hint=_REFETCH)
    return header


def _entry(path: Path, name: str, value: Any) -> _Entry:
    def count(n: Any) -> bool:
        return type(n) is int and 0 <= n < 2**53

    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        sound = dtype in ITEM_BYTES and isinstance(shape, list) and all(map(count, shape))
        sound = sound and count(begin) and count(end)
        sound = sound and end - begin == math.prod(shape) * ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise NotACheckpoint(
            f"{path} is damaged: the header says of tensor {name!r}: {str(value)[:120]}",
            hint=_REFETCH,
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _check_places(path: Path, entries: Mapping[str, _Entry], room: int, size: int) -> None:
    last = 0
    before = ""
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if e.end > room:
            most = max(x.end for x in entries.values())
            raise _truncated(path, f"its tensors need {size - room + most} bytes", size)
        if e.begin < last:
            raise NotACheckpoint(
                f"{path} is damaged: tensors {before!r} and {name!r} overlap", hint=_REFETCH
            )
        last, before = e.end, name


def _truncated(path: Path, needs: str, size: int) -> NotACheckpoint:
    return NotACheckpoint(f"{path} is truncated: {needs}, the file has {size}", hint=_REFETCH)
