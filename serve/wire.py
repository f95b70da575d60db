"""What the server and its worker say to each other: frames of JSON and bytes on a pipe.

A frame is a head (magic, bytes of JSON, number of blobs, little endian), the size of each blob in
eight bytes, the JSON object, the blobs. Nothing on the wire can name code: a damaged or hostile
frame is refused, not run.

checked by  tests/http/test_wire.py
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

MAGIC = b"SDE1"
HEAD = struct.Struct("<4sII")
SIZE = struct.Struct("<Q")
MOST_JSON = 2**24
MOST_BLOBS = 4096
MOST_BYTES = 2**31


class BadFrame(ValueError):
    """Bytes that are no frame: the other side is not who it should be, or is broken."""


@dataclass(frozen=True)
class Message:
    kind: str
    fields: Mapping[str, Any]
    blobs: tuple[bytes, ...] = ()


def pack(kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> bytes:
    """One frame. `fields` is what JSON can hold."""
    text = json.dumps({"kind": kind, **({} if fields is None else fields)}).encode()
    assert max(len(text) / MOST_JSON, len(blobs) / MOST_BLOBS) <= 1, "a frame of our own is too big"
    sizes = b"".join(SIZE.pack(len(blob)) for blob in blobs)
    return b"".join([HEAD.pack(MAGIC, len(text), len(blobs)), sizes, text, *blobs])


def read(stream: BinaryIO) -> Message | None:
    """The next frame of a blocking stream; None at its end. Raises BadFrame."""
    head = stream.read(HEAD.size)
    if not head:
        return None
    length, count = _head(head)
    sizes = _sizes(_exactly(stream, SIZE.size * count))
    text = _exactly(stream, length)
    return _message(text, [_exactly(stream, size) for size in sizes])


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """As `read`, without blocking."""
    try:
        length, count = _head(await reader.readexactly(HEAD.size))
        sizes = _sizes(await reader.readexactly(SIZE.size * count))
        text = await reader.readexactly(length)
        return _message(text, [await reader.readexactly(size) for size in sizes])
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadFrame("the stream ended within a frame") from None
        return None


def _exactly(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise BadFrame(f"the stream ended within a frame: {len(found)} of {size} bytes")
    return found


def _head(head: bytes) -> tuple[int, int]:
    if len(head) != HEAD.size:
        raise BadFrame("the stream ended within a frame")
    magic, length, count = HEAD.unpack(head)
    if magic != MAGIC:
        raise BadFrame(f"a frame begins with {magic!r}, not {MAGIC!r}")
    if length > MOST_JSON or count > MOST_BLOBS:
        raise BadFrame(f"a frame of {length} bytes of JSON and {count} blobs is too large")
    return length, count


def _sizes(raw: bytes) -> list[int]:
    sizes = [size for (size,) in SIZE.iter_unpack(raw)]
    if sum(sizes) > MOST_BYTES:
        raise BadFrame(f"a frame of {sum(sizes)} bytes is too large")
    return sizes


def _message(text: bytes, blobs: list[bytes]) -> Message:
    try:
        fields = json.loads(text)
        kind = fields.pop("kind")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise BadFrame(f"a frame's text is no message: {text[:40]!r}") from None
    return Message(kind, fields, tuple(blobs))
