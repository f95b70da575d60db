"""Frames between server and worker."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine.serve import wire

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text().filter(lambda k: k != "kind"), VALUES), st.lists(st.binary()))
def test_what_goes_in_comes_out(fields, blobs):
    stream = io.BytesIO(wire.pack("step", fields, blobs) + wire.pack("done"))
    first = wire.read(stream)
    assert (first.kind, first.fields, list(first.blobs)) == ("step", fields, blobs)
    assert wire.read(stream).kind == "done"
    assert wire.read(stream) is None


def frame(text: bytes, magic: bytes = b"SDE1", length: int | None = None, count: int = 0) -> bytes:
    """By the module's description, not by its code."""
    return struct.pack("<4sII", magic, len(text) if length is None else length, count) + text


@pytest.mark.parametrize(
    "raw",
    [
        frame(b'{"kind":"a"}')[:-1],
        frame(b'{"kind":"a"}')[:5],
        frame(b'{"kind":"a"}', magic=b"\x80\x04K\x01"),  # how a pickle begins
        frame(b"{}"),
        frame(b"[]"),
        frame(b"not json"),
        frame(b"", length=2**31),
        frame(b"", count=2**31),
        frame(b"[" * 100_000),
        struct.pack("<4sIIQ", b"SDE1", 2, 1, 2**40) + b"{}",
    ],
)
def test_what_is_no_frame_is_refused(raw):
    with pytest.raises(wire.BadFrame):
        wire.read(io.BytesIO(raw))
