"""What lies under a mask, and the part that it covers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sdengine.engine.errors import RequestError
from sdengine.engine.request import Request
from sdengine.serve.masked import filled, masked, region


def covered(size, box):
    mask = np.zeros(size, bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("size", "box", "padding", "aspect", "expected"),
    [
        ((100, 100), (40, 40, 60, 60), 0, 1.0, (40, 40, 60, 60)),
        ((100, 100), (40, 40, 60, 60), 5, 1.0, (35, 35, 65, 65)),
        ((100, 100), (40, 40, 60, 60), 0, 2.0, (30, 40, 70, 60)),
        ((100, 100), (40, 40, 60, 60), 0, 0.5, (40, 30, 60, 70)),
        ((100, 100), (0, 0, 10, 10), 0, 2.0, (0, 0, 20, 10)),  # moved inside
        ((100, 100), (90, 90, 100, 100), 3, 1.0, (87, 87, 100, 100)),
        ((40, 100), (0, 0, 100, 30), 0, 1.0, (0, 0, 100, 40)),  # no room: all of it
    ],
)
def test_a_region(size, box, padding, aspect, expected):
    assert region(covered(size, box), padding, aspect) == expected


def test_a_mask_that_covers_nothing_is_refused():
    with pytest.raises(RequestError, match="covers nothing") as caught:
        region(np.zeros((8, 8), bool), 0, 1.0)
    assert "white" in caught.value.hint


def test_a_hole_takes_the_colours_around_it():
    left_red = np.zeros((64, 64, 3), np.uint8)
    left_red[:, :32] = (250, 0, 0)
    left_red[:, 32:] = (0, 0, 250)
    mask = covered((64, 64), (8, 20, 16, 40))
    out = np.asarray(filled(Image.fromarray(left_red), mask))
    assert np.array_equal(out[~mask], left_red[~mask])
    assert np.abs(out[mask].astype(int) - (250, 0, 0)).max() <= 8  # all around it is red
    whole = filled(Image.fromarray(left_red), np.ones((64, 64), bool))
    assert np.array_equal(np.asarray(whole), left_red)  # nothing is known to fill it with


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_a_part_is_run_at_the_full_size_and_put_back():
    picture = np.random.default_rng(3).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    mask = np.where(covered((60, 80), (50, 10, 70, 30)), 255, 0).astype(np.uint8)
    request = Request(width=128, height=128, invert_mask=True)
    given = {"image": [png(picture)], "mask": png(255 - mask)}
    run, part, put_back = masked(
        request, given, {"fill": "none", "region": {"padding": 0, "blur": 0}}
    )
    assert (run.width, run.height, run.invert_mask) == (128, 128, False)
    assert np.array_equal(np.asarray(part["image"][0]), picture[10:30, 50:70])
    assert (part["mask"] == 255).all()
    made, about = put_back(Image.new("RGB", (128, 128), (1, 2, 3)), {"model": "x"})
    expected = picture.copy()
    expected[10:30, 50:70] = (1, 2, 3)
    assert np.array_equal(np.asarray(made), expected)
    assert about["region"] == "50,10,70,30"


def test_a_mask_without_its_picture_is_refused():
    with pytest.raises(RequestError, match="one picture"):
        masked(Request(), {"mask": b""}, {"fill": "around", "region": None})
