"""Every way in which a request can be wrong, and its hint."""

from __future__ import annotations

import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.errors import RequestError, UnknownName
from sdengine.engine.request import Request
from sdengine.engine.schedule import Training

BAD = [
    ({"width": 0}, "width is 0", "range"),
    ({"height": 10**6}, "height is 1000000", "range"),
    ({"width": 512.0}, "not a whole number", "16 to 4096"),
    ({"steps": 0}, "steps is 0", "range"),
    ({"steps": 1001}, "steps is 1001", "range"),
    ({"steps": True}, "not a whole number", "1 to 1000"),
    ({"seed": -1}, "seed is -1", "range"),
    ({"seed": 2**32}, "seed is 4294967296", "range"),
    ({"seed": 2**32 - 1, "count": 2}, "reach past seed", "4294967294"),
    ({"guidance": float("nan")}, "guidance is nan", "range"),
    ({"guidance": "7"}, "guidance is '7'", "range"),
    ({"eta": 1.5, "sampler": "ddim"}, "eta is 1.5", "range"),
    ({"eta": 0.5, "sampler": "plms"}, "takes no eta", "ddim"),
    ({"count": 0}, "count is 0", "range"),
    ({"batch_size": 0}, "batch_size is 0", "range"),
    ({"prompt": b"bytes"}, "not text", "decoded"),
    ({"sampler": "dpmp_2m"}, "unknown sampler", "'dpmpp_2m'"),
    ({"schedule": "kerras"}, "unknown schedule", "'karras'"),
]


@pytest.mark.parametrize(("fields", "message", "hint"), BAD)
def test_refused_with_a_hint(fields, message, hint):
    with pytest.raises(RequestError, match=message) as caught:
        Request(**fields)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_zero_and_empty_are_legal():
    request = Request(prompt="", guidance=0.0, seed=0).completed((64, 128))
    assert (request.seed, request.guidance, request.height, request.width) == (0, 0.0, 64, 128)
    assert request.schedule == "uniform"


def test_round_trip():
    request = Request(prompt='ä\n"b"', seed=3, width=64)
    assert Request.from_dict(request.to_dict()) == request


def test_a_field_from_elsewhere_is_an_error():
    with pytest.raises(UnknownName, match="request field"):
        Request.from_dict({"prompt": "x", "cfg_scale": 3})


TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)


def test_unknown_schedule_and_steps_out_of_range():
    with pytest.raises(UnknownName):
        schedule.make("lineer", TRAINING, 10)
    with pytest.raises(RequestError, match="1 to 1000"):
        schedule.make("leading", TRAINING, 0)


def test_unknown_sampler_by_name():
    with pytest.raises(UnknownName) as caught:
        solvers.find("eulr")
    assert "'euler'" in caught.value.hint


@pytest.mark.parametrize("steps", [3, 9, 27, 36, 37, 101, 111, 251, 333, 501, 1000])
def test_counts_that_the_reference_cannot_run_are_refused_by_name(steps):
    with pytest.raises(RequestError, match="would need timestep") as caught:
        schedule.make("reference", TRAINING, steps)
    assert "--schedule leading" in caught.value.hint
    assert len(schedule.make("leading", TRAINING, steps)) == steps
