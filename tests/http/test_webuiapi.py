"""The whole surface of the client package `webuiapi`, with the embedded model."""

from __future__ import annotations

import base64
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageDraw

import sdengine


@pytest.fixture(scope="module")
def api(emoji: Any) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{emoji.url}/sdapi/v1", sampler="Euler a", steps=2)


SMALL = {"width": 128, "height": 128}


def photo(size: tuple[int, int] = (128, 128)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((20, 20, 100, 100), fill="gold", outline="black")
    return image


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int] = (128, 128)) -> Image.Image:
    image = Image.new("L", size, 0)
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


def test_txt2img_is_our_own_picture(api):
    """The same pixels as the engine gives for what the words mean; and `info` as theirs."""
    result = api.txt2img(prompt="a (red:1.2) heart", negative_prompt="blue", seed=7, cfg_scale=6.0,
                         n_iter=2, scheduler="Karras", **SMALL)  # fmt: skip
    assert len(result.images) == 2
    with sdengine.load("emoji", threads=1) as pipe:
        own = pipe(prompt="a (red:1.2) heart", negative_prompt="blue", seed=7, guidance=6.0,
                   steps=2, sampler="euler_a", schedule="karras", eta=1.0, prompt_weights=True,
                   long_prompt=True)  # fmt: skip
    assert np.array_equal(np.asarray(result.image), np.asarray(own.image))
    info = result.info
    assert (info["seed"], info["all_seeds"], info["all_subseeds"]) == (7, [7, 8], [7, 8])
    assert info["all_prompts"] == ["a (red:1.2) heart"] * 2
    assert (info["sampler_name"], info["cfg_scale"], info["steps"]) == ("Euler a", 6.0, 2)
    assert (info["width"], info["height"], info["batch_size"]) == (128, 128, 1)
    assert info["sd_model_name"] == "emoji"
    assert info["sd_model_hash"] == own.pictures[0].about["model_sha256"][:10]
    assert info["infotexts"][1] == result.images[1].info["parameters"]
    assert "Seed: 8, Size: 128x128" in info["infotexts"][1]
    assert "Schedule type: Karras" in info["infotexts"][0]
    assert result.parameters["prompt"] == "a (red:1.2) heart"


def test_a_batch_and_a_variation(api):
    result = api.txt2img(prompt="x", seed=3, batch_size=2, subseed=5, subseed_strength=0.4, **SMALL)
    assert result.info["all_seeds"] == [3, 3]
    assert result.info["all_subseeds"] == [5, 6]
    assert not np.array_equal(*(np.asarray(image) for image in result.images))


def test_img2img(api):
    image = photo()
    weak = api.img2img([image], prompt="a face", seed=1, steps=8, denoising_strength=0.13, **SMALL)
    strong = api.img2img([image], prompt="a face", seed=1, steps=3, denoising_strength=1.0, **SMALL)
    near, far = (np.abs(np.asarray(r.image, int) - np.asarray(image, int)).mean()
                 for r in (weak, strong))  # fmt: skip
    assert near < far
    assert weak.info["denoising_strength"] == 0.13


def test_a_mask_keeps_the_rest(api):
    image, mask = photo(), mask_of((64, 0, 127, 127))
    whole = api.img2img([image], mask_image=mask, prompt="a cat", seed=1, mask_blur=0,
                        inpaint_full_res=False, inpainting_fill=1, **SMALL).image  # fmt: skip
    assert np.array_equal(np.asarray(whole)[:, :64], np.asarray(image)[:, :64])
    assert not np.array_equal(np.asarray(whole)[:, 64:], np.asarray(image)[:, 64:])
    turned = api.img2img(
        [image],
        mask_image=mask,
        prompt="a cat",
        seed=1,
        mask_blur=0,
        inpaint_full_res=False,
        inpainting_mask_invert=1,
        **SMALL,
    ).image
    assert np.array_equal(np.asarray(turned)[:, 64:], np.asarray(image)[:, 64:])


def test_only_the_masked_part_is_made(api):
    """The client's own default. The answer has the size of the picture that was sent."""
    image = photo((200, 150))
    result = api.img2img([image], mask_image=mask_of((120, 60, 150, 90), (200, 150)), prompt="eye",
                         seed=1, inpaint_full_res_padding=8, mask_blur=2, **SMALL)  # fmt: skip
    assert result.image.size == (200, 150)
    changed = np.any(np.asarray(result.image) != np.asarray(image), axis=-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows.min() >= 52
    assert rows.max() <= 98
    assert columns.min() >= 112
    assert columns.max() <= 158


def test_progress_with_a_preview_then_interrupt(api):
    found: list[Any] = []
    call = threading.Thread(target=lambda: found.append(
        api.txt2img(prompt="x", seed=1, steps=150, n_iter=8, **SMALL)))  # fmt: skip
    call.start()
    seen: dict[str, Any] = {}
    end = time.monotonic() + 30
    while time.monotonic() < end and not seen.get("current_image"):
        seen = api.get_progress()
        time.sleep(0.01)
    assert 0 < seen["progress"] < 1
    assert seen["eta_relative"] > 0
    assert seen["state"]["sampling_steps"] == 150
    assert seen["state"]["job_count"] == 8
    with Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))) as preview:
        assert preview.size == (128, 128)
    assert api.skip() == {}
    while time.monotonic() < end and api.get_progress()["state"]["job_no"] == 0:
        time.sleep(0.01)
    assert api.interrupt() == {}
    call.join(30)
    (result,) = found
    assert 2 <= len(result.images) < 8  # what was skipped and what was interrupted are among them
    assert all(image.size == (128, 128) for image in result.images)
    assert "interrupted" in result.images[-1].info["sdengine"]
    api.util_wait_for_ready(check_interval=0.05)


def test_lists(api):
    assert "Euler a" in api.util_get_sampler_names()
    assert {"karras", "automatic", "uniform"} <= set(api.util_get_scheduler_names())
    (model,) = api.get_sd_models()
    assert model["title"] == f"emoji [{model['hash']}]"
    assert "/" not in model["filename"]
    assert [u["name"] for u in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert api.get_memory()["ram"]["used"] > 1e8
    assert api.get_cmd_flags()["api"] is True
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    for nothing in (api.get_sd_vae, api.get_loras, api.get_hypernetworks, api.get_face_restorers,
                    api.get_realesrgan_models, api.get_prompt_styles, api.get_artists,
                    api.get_latent_upscale_modes, api.get_artist_categories):  # fmt: skip
        assert nothing() == []
    assert api.refresh_checkpoints() is None


def test_options(api, capsys):
    before = api.get_options()
    assert before["sd_model_checkpoint"].startswith("emoji [")
    api.util_set_model("emoij")
    assert "model changed to emoji" in capsys.readouterr().out
    assert api.util_get_current_model() == before["sd_model_checkpoint"]
    refused = api.set_options({"sd_vae": "x"})
    assert refused["error"] == "UnknownName"
    assert api.set_options({"samples_format": "jpg"}) is None
    try:
        assert api.txt2img(prompt="x", seed=1, **SMALL).image.format == "JPEG"
        other = api.txt2img(prompt="x", override_settings={"samples_format": "webp"}, **SMALL)
        assert other.image.format == "WEBP"
        assert "Steps: 2" in other.info["infotexts"][0]
    finally:
        api.set_options({"samples_format": "png"})


def test_upscaling_by_arithmetic(api):
    image = photo((60, 40))
    twice = api.extra_single_image(image, upscaler_1="Lanczos", upscaling_resize=2).image
    own = image.resize((120, 80), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(twice), np.asarray(own))
    sized = api.extra_single_image(image, resize_mode=1, upscaler_1="Nearest",
                                   upscaling_resize_w=50, upscaling_resize_h=50)  # fmt: skip
    assert sized.image.size == (50, 50)
    both = api.extra_batch_images([image, photo((20, 20))], upscaling_resize=3)
    assert [one.size for one in both.images] == [(180, 120), (60, 60)]


def test_a_picture_tells_how_it_was_made_and_is_made_again(api):
    first = api.txt2img(prompt="a, b: c", negative_prompt='say "no"', seed=11, **SMALL)
    told = api.png_info(first.image)
    assert told.info == first.image.info["parameters"]
    assert told.parameters["Prompt"] == "a, b: c"
    assert told.parameters["Negative prompt"] == 'say "no"'
    assert (told.parameters["Seed"], told.parameters["Steps"]) == ("11", "2")
    again = api.session.post(f"{api.baseurl}/txt2img", json={"infotext": told.info, "eta": 1.0})
    data = base64.b64decode(again.json()["images"][0])
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["sdengine"] == first.image.info["sdengine"]
        assert np.array_equal(np.asarray(image), np.asarray(first.image))
    assert api.png_info(photo()).info == ""


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"enable_hr": True}, 400, "img2img on the result"),
        ({"sampler_name": "DPM adaptive"}, 400, "does not fit"),
        ({"sampler_name": "Eular"}, 400, "did you mean 'euler'"),
        ({"scheduler": "Turbo"}, 400, "unknown scheduler"),
        ({"tiling": True}, 400, "tiling"),
        ({"styles": ["nice"]}, 400, "styles"),
        ({"save_images": True}, 400, "nothing is written"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": ""}]}}}, 400, "ControlNet"),
        ({"override_settings": {"sd_model_checkpoint": "../x"}}, 404, "no model"),
        ({"batch_size": 0}, 400, "from 1"),
        ({"width": 5000}, 400, "16 to 4096"),
        ({"steps": 151}, 413, "at most 150"),
        ({"seed": 2**32}, 400, "seed"),
        ({"cfg_scale": "high"}, 422, "cfg_scale"),
        ({"prompt": None}, 422, "prompt"),
    ],
)
def test_refusals_have_its_shape(api, fields, status, says):
    response = api.session.post(f"{api.baseurl}/txt2img", json={"steps": 1, **SMALL, **fields})
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail", "body", "errors", "hint"}
    assert says in f"{body['detail']} {body['hint']}"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "without init_images"),
        ({"init_images": ["http://example.org/a.png"]}, "never opened"),
        ({"init_images": ["/etc/passwd"]}, "never opened"),
        ({"init_images": ["QUJD"]}, "no known picture"),
        ({"inpainting_fill": 2}, "fills with the colours"),
        ({"resize_mode": 3}, "latent upscaling"),
        ({"mask": "empty"}, "covers nothing"),
    ],
)
def test_refusals_of_pictures(api, fields, says):
    image = webuiapi.b64_img(photo())
    mask = webuiapi.b64_img(mask_of((0, 0, 9, 9)))
    given = {"init_images": [image], "mask": mask, "steps": 4, **SMALL, **fields}
    if not fields:
        del given["init_images"]
    if fields.get("mask") == "empty":
        given["mask"] = webuiapi.b64_img(Image.new("L", (128, 128), 0))
    response = api.session.post(f"{api.baseurl}/img2img", json=given)
    assert response.status_code == 400, response.text
    body = response.json()
    assert says in f"{body['detail']} {body['hint']}"


def test_what_is_not_offered_says_so(api):
    with pytest.raises(RuntimeError, match="no model here says"):
        api.interrogate(photo())
    with pytest.raises(RuntimeError, match="404"):
        api.custom_post("controlnet/detect", {})
    unknown = api.session.post(f"{api.baseurl}/txt2img", json={"steps": 1, "forge": 1, **SMALL})
    assert "ignored: forge" in unknown.json()["info"]
