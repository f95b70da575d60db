"""Image to image that keeps the depth of the picture: a fifth channel holds it.

source      reference-spec 3.9
"""

from __future__ import annotations

from dataclasses import replace

from .. import prepare as nets
from ..inputs import open_depth
from ..ports import Floats
from . import img2img
from .work import Begin, Beginning, Streams, Work


def prepare(work: Work) -> Begin:
    depth = nets.depth_condition(_depth(work), work.shape[1:])
    begin_picture = img2img.prepare(work)

    def begin(streams: Streams) -> Beginning:
        if work.table.start_scale == 0.0:  # the reference's strength 1: the picture is not used
            return Beginning(work.start(streams.start.normal(work.shape)), depth)
        return replace(begin_picture(streams), channels=depth)

    return begin


def _depth(work: Work) -> Floats:
    """Relative inverse depth of the canvas, [h', w'], from the user or the model's own network."""
    if work.given.depth is not None:
        return work.placed.padded(work.placed.scaled(open_depth(work.given.depth)))
    image = nets.for_depth(work.placed.pixels)
    session = work.open("depth", {"B": 1, "H": image.shape[2], "W": image.shape[3]})
    found: Floats = session({"image": image})["depth"][0]
    return found
