"""A safetensors file: its header, checked against the file's size, and single small tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import fields
from .errors import BadManifest, CorruptPart, StorageError

ITEM_BYTES: Mapping[str, int] = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1}

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_REFETCH = "fetch the file again, or export the model again: `sdengine export`"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `offset` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of the file, in file order.

    raises      CorruptPart unless the tensors fill the file without a gap or an overlap
                StorageError when the file cannot be read
    source      the format as the safetensors README gives it: u64 little endian header length,
                JSON, data
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _corrupt(path, f"its header of {length} bytes does not fit its {size} bytes")
            raw = file.read(length)
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}", hint="check the file and its permissions"
        ) from error
    try:
        entries = _HEADER(_without_metadata(fields.parse(raw)), "header")
    except BadManifest as error:
        raise _corrupt(path, f"its header is damaged: {error.message}") from error
    return _laid_out(path, entries, start=8 + length, size=size)


@dataclass(frozen=True)
class Totals:
    """Of all tensors of a file: `values` numbers, `nbytes` bytes."""

    values: int
    nbytes: int


@lru_cache(maxsize=256)
def totals(path: Path, sha256: str) -> Totals:
    """What a file of this content amounts to, from its header.

    Read once in a process: every run asks, and a header of hundreds of tensors takes milliseconds;
    nor must the file still be there when it is asked again. Raises as `read_header`.
    """
    tensors = read_header(path).values()
    return Totals(sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors))


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    """These tensors, widened to float32; the rest of the file stays unread.

    raises      CorruptPart for a name that the file lacks, and as `read_header`
    """
    return dict(each_tensor(path, names))


def each_tensor(path: Path, names: Iterable[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """As `read_tensors`, one after the other: only one is in memory."""
    stored = read_header(path)
    with open(path, "rb") as file:
        for name in names:
            if name not in stored:
                raise CorruptPart(
                    f"{path} has no tensor {name!r}; it has {len(stored)} others", hint=_REFETCH
                )
            where = stored[name]
            file.seek(where.offset)
            yield name, _widened(where.dtype, file.read(where.nbytes)).reshape(where.shape)


def _widened(dtype: str, raw: bytes) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


_HEADER = fields.mapping(
    fields.text,
    fields.record(
        _Entry,
        {
            "dtype": fields.one_of(*ITEM_BYTES),
            "shape": fields.sequence(fields.integer(0)),
            "data_offsets": fields.sequence(fields.integer(0), low=2, high=2),
        },
    ),
    low=1,
)


def _without_metadata(header: Any) -> Any:
    if not isinstance(header, dict):
        return header
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _laid_out(
    path: Path, entries: Mapping[str, _Entry], *, start: int, size: int
) -> dict[str, Stored]:
    result: dict[str, Stored] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        nbytes = ITEM_BYTES[entry.dtype]
        for side in entry.shape:
            nbytes *= side
        if begin != end or stop - begin != nbytes:
            raise _corrupt(
                path,
                f"tensor {name!r} ({entry.dtype} {list(entry.shape)}, {nbytes} bytes) lies at "
                f"{begin}..{stop}, expected {end}..{end + nbytes}",
            )
        result[name] = Stored(entry.dtype, entry.shape, start + begin, nbytes)
        end = stop
    if start + end != size:
        raise _corrupt(path, f"it has {size} bytes where its header needs {start + end}")
    return result


def _corrupt(path: Path, what: str) -> CorruptPart:
    return CorruptPart(f"{path} is not a sound safetensors file: {what}", hint=_REFETCH)
