"""Text to image: pure noise in, nothing beside the text."""

from __future__ import annotations

from .work import Begin, Beginning, Streams, Work


def prepare(work: Work) -> Begin:
    def begin(streams: Streams) -> Beginning:
        return Beginning(work.start(streams.start.normal(work.shape)))

    return begin
