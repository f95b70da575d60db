"""Tasks: which one runs, and what each hands to the network. No engine library, no torch.

The networks' answers are known (backends.fake): the UNet denoises towards one picture, the VAE is
squares of colour; so what a task must give can be said in closed form.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.engine import tasks
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError, StorageError, UnknownName
from sdengine.engine.given import Given
from sdengine.engine.noise import TorchNoise
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.request import Request

HEIGHT, WIDTH, FACTOR = 64, 128, 8


def sibling(name: str):
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(tmp_path):
    sibling("tiny_bundle").write(tmp_path / "fake")
    spec = importlib.util.find_spec("open_clip")
    vocabulary = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return replace(open_bundle(tmp_path / "fake"), tokenizer_file=vocabulary)


def pipeline(bundle, **facts):
    bundle = replace(bundle, facts=replace(bundle.facts, **facts))
    return Pipeline(bundle, api.EngineSessions(bundle, Fake(prediction="v"), "f32", None), {})


@pytest.fixture
def pipe(bundle):
    return pipeline(bundle)


def squares(rng, height=HEIGHT, width=WIDTH):
    """A picture that the fake VAE keeps: every latent cell one colour, away from the ends."""
    cells = rng.integers(40, 216, (height // FACTOR, width // FACTOR, 3), np.uint8)
    return Image.fromarray(cells.repeat(FACTOR, 0).repeat(FACTOR, 1))


def facts_of(variant):
    class Facts:
        name = "m"

    Facts.variant = variant
    return Facts


PICTURE = Image.new("RGB", (8, 8))
CHOICES = [
    ("base", {}, "txt2img"),
    ("base", {"images": 1}, "img2img"),
    ("base", {"images": 1, "mask": PICTURE}, "inpaint"),
    ("inpainting", {"images": 1, "mask": PICTURE}, "inpaint"),
    ("depth", {"images": 1}, "depth2img"),
    ("depth", {"images": 1, "depth": PICTURE}, "depth2img"),
    ("x4-upscaler", {"images": 1}, "upscale"),
    ("unclip-h", {"images": 1}, "unclip"),
    ("unclip-l", {"images": 3}, "unclip"),
]
NONSENSE = [
    ("base", {"images": 2}, "takes one picture; 2 given", "--image"),
    ("base", {"mask": PICTURE}, "takes one picture; 0 given", "--image"),
    ("base", {"images": 1, "depth": PICTURE}, "no depth map", "--depth"),
    ("inpainting", {}, "an inpainting model, which needs more", "--image and --mask"),
    ("inpainting", {"images": 1}, "needs a mask", "--mask"),
    ("depth", {}, "a depth-to-image model, which needs more", "--image"),
    ("depth", {"images": 1, "mask": PICTURE}, "takes no mask", "--mask"),
    ("x4-upscaler", {}, "an upscaler, which needs more", "--image"),
    ("x4-upscaler", {"images": 2}, "one picture; 2 given", "--image"),
    ("unclip-h", {}, "picture variations, which needs more", "--image"),
    ("unclip-h", {"images": 17}, "1 to 16 pictures; 17 given", "--image"),
]


def given(images=0, **others):
    return Given((PICTURE,) * images, **others)


@pytest.mark.parametrize(("variant", "pictures", "name"), CHOICES)
def test_the_task_follows_from_model_and_pictures(variant, pictures, name):
    assert tasks.choose(facts_of(variant), None, given(**pictures)).name == name
    assert tasks.choose(facts_of(variant), name, given(**pictures)).name == name


@pytest.mark.parametrize(("variant", "pictures", "message", "hint"), NONSENSE)
def test_a_combination_that_makes_no_sense_says_why(variant, pictures, message, hint):
    with pytest.raises(RequestError, match=message) as caught:
        tasks.choose(facts_of(variant), None, given(**pictures))
    assert hint in caught.value.hint


def test_a_task_of_another_model_is_refused_with_those_it_can_do():
    with pytest.raises(RequestError, match="is an upscaler: it cannot do img2img") as caught:
        tasks.choose(facts_of("x4-upscaler"), "img2img", given(1))
    assert "upscale" in caught.value.hint
    assert "variant base" in caught.value.hint
    with pytest.raises(UnknownName, match="unknown task"):
        tasks.choose(facts_of("base"), "img2im", given(1))
    with pytest.raises(RequestError, match="task img2img takes one picture; 0 given"):
        tasks.choose(facts_of("base"), "img2img", given())


@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
def test_img2img_starts_from_the_picture_and_its_own_noise(bundle, rng, strength):
    """A network that sees exactly the noise that was put in takes it all out again: the second draw
    of the picture's stream, since the first one is the encoder's."""
    image, stream = squares(rng), TorchNoise(1)
    shape = (4, HEIGHT // FACTOR, WIDTH // FACTOR)
    _, drawn = stream.normal(shape), stream.normal(shape)
    fake = Fake(prediction="eps", noise=drawn)
    bundle = replace(bundle, facts=replace(bundle.facts, prediction="eps"))
    pipe = Pipeline(bundle, api.EngineSessions(bundle, fake, "f32", None), {})
    result = pipe(
        image=image, steps=10, strength=strength, guidance=1.0, sampler="ddim",
        schedule="trailing", seed=1,
    )  # fmt: skip
    difference = np.asarray(result.image, int) - np.asarray(image, int)
    assert np.abs(difference).max() <= 2  # the VAE's own round trip
    assert result.request.task == "img2img"


@pytest.mark.parametrize(
    ("strength", "steps", "calls"), [(0.29, 100, 29), (0.8, 25, 20), (0.5, 3, 1), (1.0, 7, 7)]
)
def test_strength_is_the_part_of_the_schedule_that_runs(pipe, rng, strength, steps, calls):
    result = pipe(image=squares(rng), strength=strength, steps=steps, sampler="ddim", seed=0)
    assert len(result.timings.rows) == calls


def test_the_references_own_arithmetic_of_strength(pipe, rng):
    """int(0.29 * 100) is 28 in floating point: reference-spec 3.7."""
    asked = {"image": squares(rng), "strength": 0.29, "steps": 100, "seed": 0}
    assert len(pipe(**asked, compat="reference").timings.rows) == 28


@pytest.mark.parametrize("strength", [0.0, 0.02])
def test_a_strength_without_a_step_is_refused(pipe, rng, strength):
    with pytest.raises(RequestError, match="leaves no step to run") as caught:
        pipe(image=squares(rng), strength=strength, steps=25)
    assert "0.04" in caught.value.hint


def test_inpainting_by_blending_keeps_what_is_not_masked(pipe, rng):
    image, mask = squares(rng), Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (64, 0, 128, 64))
    asked = {"prompt": "x", "image": image, "mask": mask, "steps": 8, "seed": 2}
    raw = pipe(**asked, paste=False).image
    left, right = (np.asarray(raw, int)[:, :64], np.asarray(raw, int)[:, 64:])
    assert np.abs(left - np.asarray(image, int)[:, :64]).max() <= 2  # the VAE's own round trip
    assert np.abs(right - np.asarray(image, int)[:, 64:]).mean() > 20
    pasted = np.asarray(pipe(**asked).image)
    np.testing.assert_array_equal(pasted[:, :64], np.asarray(image)[:, :64])
    np.testing.assert_array_equal(pasted[:, 64:], np.asarray(raw)[:, 64:])
    swapped = np.asarray(pipe(**asked, invert_mask=True).image)
    np.testing.assert_array_equal(swapped[:, 64:], np.asarray(image)[:, 64:])


def test_an_all_black_mask_gives_the_picture_back(pipe, rng):
    image = squares(rng)
    result = pipe(image=image, mask=Image.new("L", (WIDTH, HEIGHT)), steps=3, seed=0)
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(image))


def test_an_all_white_mask_is_text_to_image(pipe, rng):
    """At strength 1 the picture is not looked at; the posterior's draw comes before the noise."""
    mask = Image.new("L", (WIDTH, HEIGHT), 255)
    one, other = (
        pipe(prompt="x", image=squares(rng), mask=mask, steps=4, seed=0).image for _ in range(2)
    )
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_any_size_comes_back_as_it_went_in(pipe, rng):
    image = squares(rng).crop((0, 0, 75, 50))
    result = pipe(image=image, strength=0.5, steps=4, seed=0)
    assert result.image.size == (75, 50)
    assert "75x50 is no multiple" in result.warnings[0]
    assert "128x64" in result.warnings[0]


@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_very_small_and_very_thin_pictures(pipe, size):
    result = pipe(image=Image.new("RGB", size, "teal"), strength=0.5, steps=4, seed=0)
    assert result.image.size == size


def test_a_picture_is_brought_to_the_size_asked_for(pipe, rng):
    result = pipe(image=squares(rng), width=64, height=64, resize="fill", steps=2, seed=0)
    assert result.image.size == (64, 64)


def test_a_picture_of_four_does_not_depend_on_its_place(pipe, rng):
    image, mask = squares(rng), Image.new("L", (WIDTH, HEIGHT), 255)
    asked = {"image": image, "mask": mask, "strength": 0.7, "steps": 4, "guidance": 3.0}
    together = pipe(**asked, seed=5, count=4, batch_size=4)
    for k, made in enumerate(together.pictures):
        alone = pipe(**asked, seed=5 + k).pictures[0]
        np.testing.assert_allclose(alone.latent, made.latent, rtol=0, atol=1e-5)


def test_weights_and_pictures_must_agree(pipe, rng):
    with pytest.raises(RequestError, match="mixes no pictures") as caught:
        pipe(image=squares(rng), weights=(1.0,))
    assert "variations" in caught.value.hint


def test_the_upscaler_takes_no_size(bundle, rng):
    with pytest.raises(RequestError, match="four times") as caught:
        pipeline(bundle, variant="x4-upscaler")(image=squares(rng), width=512)
    assert "resize" in caught.value.hint


def test_a_picture_that_is_not_there(pipe, tmp_path):
    with pytest.raises(StorageError) as caught:
        pipe(image=tmp_path / "none.png")
    assert "check the path" in caught.value.hint


# What a picture says of those that it was made from


def saved(tmp_path, rng, name="in.png"):
    path = tmp_path / name
    squares(rng).save(path)
    return path


def test_a_run_is_repeated_from_its_picture(pipe, rng, tmp_path):
    source, mask = saved(tmp_path, rng), tmp_path / "m.png"
    Image.new("L", (WIDTH, HEIGHT), 255).save(mask)
    first = pipe(image=source, mask=str(mask), strength=0.5, steps=4, seed=9).pictures[0]
    past = api.recorded(first.save(tmp_path / "out.png"))
    again = pipe(Request.from_dict(past.request), **past.pictures).pictures[0]
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(again.image))
    assert past.pictures == {"image": [source], "mask": mask}


def test_a_source_that_is_gone_changed_or_was_never_a_file(pipe, rng, tmp_path):
    source = saved(tmp_path, rng)
    out = pipe(image=source, steps=4, seed=9).pictures[0].save(tmp_path / "out.png")
    squares(rng).save(source)
    with pytest.raises(RequestError, match="has changed since") as caught:
        api.recorded(out)
    assert "--image" in caught.value.hint
    source.unlink()
    with pytest.raises(RequestError, match="is gone"):
        api.recorded(out)
    other = saved(tmp_path, rng, "other.png")
    assert api.recorded(out, {"image": other}).pictures == {"image": other}
    loose = pipe(image=squares(rng), steps=4, seed=9).pictures[0].save(tmp_path / "loose.png")
    with pytest.raises(RequestError, match="was never a file"):
        api.recorded(loose)


def test_a_foreign_picture_cannot_be_repeated(tmp_path, rng):
    with pytest.raises(RequestError, match="does not say how it was made") as caught:
        api.recorded(saved(tmp_path, rng))
    assert "sdengine saved" in caught.value.hint
