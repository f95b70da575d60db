"""Every way in which a request can be wrong, and its hint."""

from __future__ import annotations

import json

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
    ({"seed": 2**32 - 1, "count": 2}, "pictures reach past", "4294967294"),
    ({"guidance": float("nan")}, "guidance is nan", "range"),
    ({"guidance": "7"}, "guidance is '7'", "range"),
    ({"eta": 1.5, "sampler": "ddim"}, "eta is 1.5", "range"),
    ({"eta": 0.5, "sampler": "plms"}, "takes no eta", "ddim"),
    ({"count": 0}, "count is 0", "range"),
    ({"batch_size": 0}, "batch_size is 0", "range"),
    ({"prompt": b"bytes"}, "not text", "decoded"),
    ({"sampler": "dpmp_2m"}, "unknown sampler", "'dpmpp_2m'"),
    ({"schedule": "kerras"}, "unknown schedule", "'karras'"),
    ({"task": "img2imgs"}, "unknown task", "'img2img'"),
    ({"strength": 1.5}, "strength is 1.5", "range"),
    ({"strength": -0.1}, "strength is -0.1", "range"),
    ({"noise_level": 20.0}, "not a whole number", "0 to 999"),
    ({"noise_level": 1000}, "noise_level is 1000", "range"),
    ({"weights": 0.5}, "not a list", "list of numbers"),
    ({"weights": (0.5, float("nan"))}, "weights is nan", "range"),
    ({"resize": "crop"}, "unknown resize", "fill"),
    ({"thin_mask": "min"}, "unknown thin-mask", "max"),
    ({"mask_blur": -1.0}, "mask_blur is -1", "range"),
    ({"compat": "a1111"}, "unknown compat", "reference"),
    ({"safety": "on"}, "unknown safety", "block"),
    ({"noise": "cuda"}, "unknown noise", "torch"),
    ({"paste": 1}, "paste is 1", "True or False"),
    ({"paste": [[1]]}, "paste is list", "True or False"),
    ({"sampler": []}, "sampler is list, not a name", "dpmpp_2m"),
    ({"task": {}}, "task is dict, not a name", "img2img"),
    ({"guidance": 10**400}, "guidance is a number of more than 64 bits", "range"),
    ({"width": -(10**5000)}, "width is a number of more than 64 bits", "range"),
    ({"tile": [[8]]}, "tile is list", "auto, off"),
    ({"tile": True}, "tile is True", "auto, off"),
    ({"tile": "9" * 10**6}, r"tile is '9{10,80}\.\.\.", "auto, off"),
    ({"background": "A" * 10**6}, "background has 1000000 characters", "#rrggbb"),
]


@pytest.mark.parametrize(("fields", "message", "hint"), BAD)
def test_refused_with_a_hint(fields, message, hint):
    with pytest.raises(RequestError, match=message) as caught:
        Request(**fields)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_name_of_any_length_is_told_in_short():
    with pytest.raises(UnknownName) as caught:
        Request(resize="x" * 10**6)
    assert len(caught.value.message) < 120


def test_zero_and_empty_are_legal():
    request = Request(prompt="", guidance=0.0, seed=0).completed("txt2img", (64, 128))
    assert (request.seed, request.guidance, request.height, request.width) == (0, 0.0, 64, 128)
    assert request.schedule == "uniform"


def test_what_is_open_takes_the_tasks_default():
    upscale = Request(seed=0).completed("upscale", None)
    assert (upscale.noise_level, upscale.guidance, upscale.strength) == (20, 9.0, None)
    assert (upscale.width, upscale.height) == (None, None)
    assert Request(noise_level=0).completed("upscale", None).noise_level == 0
    assert Request(strength=0.0).completed("img2img", None).strength == 0.0


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("euler_a", 1.0), ("plms", None)])
def test_eta_is_the_samplers_own(sampler, eta):
    """A picture's file names it; DDIM's is 0, an ancestral sampler's 1 (docs/samplers.md)."""
    assert Request(sampler=sampler).completed("txt2img", (64, 64)).eta == eta
    if eta is not None:
        assert Request(sampler=sampler, eta=0.25).completed("txt2img", (64, 64)).eta == 0.25


def test_the_references_defaults_by_name():
    """reference-spec 3.12, and its own sampler and spacing; another sampler brings its own."""
    old = Request(compat="reference").completed("depth2img", None)
    assert (old.steps, old.guidance, old.strength) == (50, 9.0, 0.9)
    assert (old.sampler, old.schedule, old.noise) == ("ddim", "reference", "torch")
    other = Request(compat="reference", sampler="dpmpp_2m").completed("txt2img", (64, 64))
    assert other.schedule == "uniform"
    assert Request(compat="reference").completed("inpaint", None).noise == "numpy"


def test_a_field_that_the_task_has_no_use_for_is_refused():
    with pytest.raises(RequestError, match="txt2img takes no strength") as caught:
        Request(strength=0.5).completed("txt2img", (64, 64))
    assert "img2img, inpaint, depth2img" in caught.value.hint


def test_round_trip():
    request = Request(prompt='ä\n"b"', seed=3, width=64, weights=(0.5, -1))
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


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
