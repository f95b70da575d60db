"""The weights of one component: a safetensors file, written and read as a stream.

source      the format as the safetensors README gives it: u64 header length, JSON, data
checked by  tests/unit/test_export_weights.py (against the safetensors library)
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..engine.weights import read_header
from .containers import ITEM_BYTES, TORCH, TensorRef

ALIGNMENT = 64  # bytes: a cache line, and what engines want to map without a copy


def write_weights(path: Path, tensors: Iterable[TensorRef]) -> str:
    """Write the tensors, one at a time; returns the file's SHA-256.

    The same tensors give the same bytes, in whatever order they come. The format allows no gaps:
    tensors whose size is a multiple of 64 bytes come first, so that they start at multiples of 64;
    the few others follow, larger powers of two first, each at a multiple of its element at least.
    """
    order = sorted(tensors, key=lambda t: (-math.gcd(ALIGNMENT, t.nbytes), t.name))
    header: dict[str, object] = {}
    end = 0
    for t in order:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for t in order:
            raw = t.read()
            digest.update(raw.data)
            file.write(raw.data)
            _let_go(raw)
    return digest.hexdigest()


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in its own dtype), read into memory of its own, one at a time."""
    stored = read_header(path)
    with open(path, "rb") as file:
        for name, where in stored.items():
            file.seek(where.offset)
            raw = bytearray(file.read(where.nbytes))
            yield name, torch.frombuffer(raw, dtype=TORCH[where.dtype]).reshape(where.shape)


def nbytes(tensors: Iterable[TensorRef]) -> int:
    return sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors)


def _let_go(raw: np.ndarray) -> None:
    """Unmap pages of a mapped file that were only read: they would count as our memory."""
    base: object = raw
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
