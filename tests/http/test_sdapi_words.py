"""AUTOMATIC1111's words: what they mean, and what is refused. No server is needed."""

from __future__ import annotations

import asyncio
import json
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from sdengine import api
from sdengine.engine.errors import RequestError, UnknownName
from sdengine.serve import infotext, sdapi
from sdengine.serve.models import Models
from sdengine.serve.sdapi_ask import Options, meant
from sdengine.serve.sdapi_fields import Img2Img, Txt2Img, check_inert

MODEL = Models({"emoji": api.EMBEDDED["emoji"]}).find(None)


def asked(**fields: Any) -> Any:
    return meant(Txt2Img(**fields), Options("emoji"), MODEL).ask.request


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        (None, None, ("euler", None)),
        ("Euler a", "Automatic", ("euler_a", None)),
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),  # as there since it has schedulers
        ("DPM++ 2M", "automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M Exponential", None, ("dpmpp_2m", "exponential")),
        ("DPM++ 2M", "SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("DPM++ 2M", "sgm_uniform", ("dpmpp_2m", "sgm_uniform")),
        ("Euler", "Uniform", ("euler", "linspace")),
        ("Euler", "sdengine uniform", ("euler", "uniform")),
        ("Euler", "trailing", ("euler", "trailing")),
        ("DDIM", "DDIM", ("ddim", "leading")),
    ],
)
def test_samplers_and_schedulers(sampler, scheduler, expected):
    request = asked(sampler_name=sampler, scheduler=scheduler)
    assert (request.sampler, request.schedule) == expected


def test_its_defaults_and_ours():
    request = asked()
    assert (request.steps, request.guidance, request.width) == (50, 7.0, None)
    assert (request.count, request.batch_size) == (1, 1)
    assert request.seed is not None
    assert request.eta is None


def test_an_eta_goes_to_samplers_that_take_one():
    """Clients send 1.0 with every sampler."""
    assert asked(sampler_name="Euler", eta=1.0).eta is None
    assert asked(sampler_name="DDIM", eta=1.0).eta == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_hr": False, "styles": [], "tiling": None, "s_churn": 0, "s_churn ": 1},
        {"alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": [False]}}},
        {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}]}}},
        {"hr_scale": 2, "firstphase_width": 0, "image_cfg_scale": 1.5},
        {"initial_noise_multiplier": 1.0, "seed_resize_from_h": -1},
    ],
)
def test_what_changes_nothing_is_taken(fields):
    assert check_inert(Txt2Img(**fields)) == [name for name in fields if name == "s_churn "]


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_hr": True}, {"styles": ["a"]}, {"s_churn": 0.1}, {"script_name": "x/y plot"},
        {"initial_noise_multiplier": 1.1}, {"alwayson_scripts": {"x": {"args": [True]}}},
        {"alwayson_scripts": {"x": {"args": {"enabled": True}}}}, {"refiner_checkpoint": "b"},
    ],
)  # fmt: skip
def test_what_would_change_something_is_refused(fields):
    with pytest.raises(RequestError) as caught:
        check_inert(Txt2Img(**fields))
    assert caught.value.hint


def test_options_are_checked():
    options = Options("emoji")
    assert options.changed({"randn_source": "NV"}).randn_source == "NV"
    with pytest.raises(UnknownName, match="unknown option 'sd_vae'"):
        options.changed({"sd_vae": "None"})
    for bad in ({"randn_source": "GPU"}, {"jpeg_quality": True}, {"sd_model_checkpoint": 3}):
        with pytest.raises(RequestError):
            options.changed(bad)


def test_a_picture_without_init_images_is_refused():
    with pytest.raises(RequestError, match="without init_images"):
        meant(Img2Img(init_images=[]), Options("emoji"), MODEL)


TEXT = (
    "a cat, sitting: there\nsecond line\nNegative prompt: ugly\nbad\nSteps: 20, Sampler: DPM++ 2M,"
    ' Schedule type: Karras, CFG scale: 6.5, Seed: 12, Size: 512x768, Model: "a, b", Version: v1'
)


def test_a_text_is_read():
    """By the format's description: the last line is one of at least three fields."""
    found = infotext.parse(TEXT)
    assert found["Prompt"] == "a cat, sitting: there\nsecond line"
    assert found["Negative prompt"] == "ugly\nbad"
    assert found["Model"] == "a, b"
    assert infotext.asked(TEXT) == {
        "prompt": "a cat, sitting: there\nsecond line", "negative_prompt": "ugly\nbad",
        "sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 20, "seed": 12,
        "cfg_scale": 6.5, "width": 512, "height": 768,
    }  # fmt: skip
    assert infotext.parse("a: b, c: d") == {"Prompt": "a: b, c: d", "Negative prompt": ""}
    assert infotext.parse(" \n") == {}


def test_a_text_stands_behind_what_is_said():
    request = asked(infotext=TEXT, steps=5)
    assert (request.steps, request.seed, request.guidance) == (5, 12, 6.5)
    assert request.prompt.startswith("a cat")


@pytest.mark.parametrize(
    "line",
    [" " * 200_000, "a" * 200_000, "a " * 100_000, 'a:"' * 60_000, "a: b," + " a" * 100_000, ","],
)
def test_no_text_takes_long(line):
    begun = perf_counter()
    infotext.parse(f"Steps: 1{line}")
    infotext.parse(f"{line}\nSteps: 1, Seed: 2{line}")
    assert perf_counter() - begun < 1


def test_numbers_out_of_bounds_are_refused():
    for field, value in (("mask_blur", 10**400), ("inpaint_full_res_padding", -50)):
        with pytest.raises(ValidationError, match=field):
            Img2Img(**{field: value})
    with pytest.raises(RequestError, match="count is") as caught:
        asked(n_iter=2**40, subseed_strength=0.5)
    assert "range" in caught.value.hint


def test_a_model_that_was_chosen_by_title_is_kept_by_name():
    """A bundle that is replaced has another title."""
    here = SimpleNamespace(model=Models({"emoji": api.EMBEDDED["emoji"]}).find)
    call: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(served=here)))
    asyncio.run(sdapi.set_options({"sd_model_checkpoint": MODEL.title}, call))
    assert call.app.state.sdapi_options.sd_model_checkpoint == "emoji"
    told = json.loads(asyncio.run(sdapi.get_options(call)).body)
    assert told["sd_model_checkpoint"] == MODEL.title
