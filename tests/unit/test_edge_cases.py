"""Bad and unusual input: every row of the reference's edge cases (reference-spec 8) is a test.

Row -> file::test, after what happens here. A file without a folder is in tests/unit.

prompt of more than 75 tokens: cut alike, and what was cut is said
    test_tokenizer.py::test_75_content_tokens_fit_and_the_76th_is_shown
    test_pipeline.py::test_a_long_prompt_is_cut_and_what_was_cut_is_shown
empty prompt: legal
    test_tokenizer.py::test_recorded_prompts  test_request.py::test_zero_and_empty_are_legal
unicode, curly quotes, entities, emoji: cleaned alike
    test_tokenizer.py::test_spec_table  test_tokenizer.py::test_random_text_as_open_clip
prompt file with a short last chunk: prompts never share a batch; a short last batch runs
    tests/cli/test_prompt_file.py::test_every_prompt_is_drawn_with_its_own_seeds
    tests/contract/test_embedded_batches.py::test_a_short_last_batch
blank lines in a prompt file: skipped
    tests/cli/test_prompt_file.py::test_a_line_is_a_prompt
width or height no multiple of 64, out of noise: made larger, cropped, said
    test_pipeline.py::test_another_size_is_made_larger_cropped_and_said
odd sizes of given pictures: padded and cropped back
    test_tasks.py::test_any_size_comes_back_as_it_went_in
    test_edge_cases.py::test_every_task_gives_the_pictures_size_back
picture with a side under 64: padded
    test_tasks.py::test_very_small_and_very_thin_pictures
result under 65,536 pixels: no mark, said
    test_edge_cases.py::test_the_mark_needs_room
    tests/golden/test_pictures.py::test_the_size_that_the_original_refuses
512 model at 768, 768 model at 512: warned of
    test_edge_cases.py::test_a_size_far_from_the_models_own_is_warned_of
huge upscale: tiled, or refused by its size
    test_memory.py::test_an_upscaler_tiles_its_unet_too
    test_edge_cases.py::test_an_upscale_beyond_the_largest_side
strength 1, img2img: the whole schedule
    test_tasks.py::test_img2img_starts_from_the_picture_and_its_own_noise
strength 1, depth2img: the whole schedule; in compat the reference's steps - 1 out of noise alone
    test_edge_cases.py::test_the_references_depth2img_at_full_strength
strength 0, and strength x steps under 1: refused
    test_tasks.py::test_a_strength_without_a_step_is_refused
steps in the reference's crash list, 1 step, more than 500 steps: all run
    test_request.py::test_counts_that_the_reference_cannot_run_are_refused_by_name
    test_edge_cases.py::test_a_single_step_of_every_sampler
    test_edge_cases.py::test_more_than_500_steps
steps that do not divide 1000: exactly as asked; of the reference's spacing, the count is said
    test_pipeline.py::test_the_reference_spacing_says_how_many_steps_it_runs
eta with PLMS, or with DPM-Solver: refused
    test_request.py::test_refused_with_a_hint
    test_edge_cases.py::test_eta_is_refused_where_it_would_be_ignored
guidance 1: one pass; guidance 0: the prompt does not count
    test_pipeline.py::test_guidance_of_one_runs_one_half
    test_edge_cases.py::test_guidance_of_zero_ignores_the_prompt
RGBA: composited
    test_inputs.py::test_composited  test_inputs.py::test_hidden_colours_do_not_appear
palette, grey, 16 bits, CMYK: converted
    test_inputs.py::test_palette  test_inputs.py::test_one_bit
    test_inputs.py::test_sixteen_bit_grey  test_inputs.py::test_cmyk
EXIF orientation: applied
    test_inputs.py::test_as_pillow_turns_it
mask polarity: white is repainted; inverted on demand
    test_tasks.py::test_inpainting_by_blending_keeps_what_is_not_masked
mask values 127 and 128: kept, repainted
    test_masks.py::test_white_is_repainted_and_the_threshold
mask of another size: the nearest pixel
    test_masks.py::test_another_size_takes_the_nearest
mask all black, all white: the picture itself; text to image
    test_tasks.py::test_an_all_black_mask_gives_the_picture_back
    test_tasks.py::test_an_all_white_mask_is_text_to_image
thin strokes of a mask: lost as in the reference, or kept on demand
    test_masks.py::test_nearest_takes_the_first_pixel_of_a_cell
    test_masks.py::test_max_keeps_a_single_pixel
RGBA as a mask: its lightness
    test_masks.py::test_colour_counts_by_lightness_and_alpha_not
flat depth map: no NaN
    test_prepare.py::test_a_flat_map_says_nothing  test_prepare.py::test_never_nan
very long picture for the depth network: no side of 0
    test_prepare.py::test_no_side_is_rounded_away
noise level out of range: refused
    tests/golden/test_augment.py::test_levels_out_of_range
    test_request.py::test_refused_with_a_hint
noise level as a float: refused
    test_request.py::test_refused_with_a_hint
mix weights that sum to 0 or are negative: refused; legal
    tests/golden/test_augment.py::test_weights_that_give_no_average
    tests/golden/test_augment.py::test_mix_by_hand
seed out of range: refused
    test_request.py::test_refused_with_a_hint  test_noise.py::test_seeds_at_the_ends
same seed, other batch size or step count: the same picture; its own noise
    test_pipeline.py::test_one_seed_one_picture_whatever_the_batch
    test_edge_cases.py::test_steps_of_one_picture_do_not_move_the_next
    tests/contract/test_embedded_batches.py::test_alone_and_in_a_batch
output folder with files: new names
    test_images.py::test_names_are_never_taken_twice
checkpoint with missing keys: refused, with all of them
    checkpoint/test_tensors.py::test_missing_unexpected_and_wrong_tensors_are_listed
v model with an eps config, or the reverse: found by a probe, or asked for
    checkpoint/test_facts.py::test_who_decides_eps_or_v
    checkpoint/test_facts.py::test_the_probe_s_threshold
EMA and other weights in one file: EMA, or the others on demand
    checkpoint/test_tensors.py::test_averaged_weights_are_preferred
    checkpoint/test_tensors.py::test_averaged_weights_can_be_declined
black output: NaN stops the run
    test_pipeline.py::test_nan_stops_the_run_and_names_the_step
    test_images.py::test_never_a_black_picture
no xformers with an unCLIP config: does not apply, there is no xformers here
    tests/parity/test_variants.py::test_variant_is_exported_and_proved
PLMS with a v model: v is converted to noise
    test_pipeline.py::test_every_sampler_ends_at_the_picture_of_the_text
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.engine import schedule, setup, solvers, tasks, watermark
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import RequestError
from sdengine.engine.given import Given
from sdengine.engine.levels import Training
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.request import Request

TESTS = Path(__file__).parents[1]
ROWS = 41  # reference-spec 8 has 42; two of them, strength 0 and under one step, are one here


def sibling(name: str):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(tmp_path):
    """Nobody reads its graphs; v-prediction, native size 64 x 128."""
    sibling("tiny_bundle").write(tmp_path / "fake")
    spec = importlib.util.find_spec("open_clip")
    vocabulary = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return replace(open_bundle(tmp_path / "fake"), tokenizer_file=vocabulary)


def of(bundle, **facts):
    return replace(bundle, facts=replace(bundle.facts, **facts))


@pytest.fixture
def pipe(bundle):
    return Pipeline(bundle, api.EngineSessions(bundle, Fake(prediction="v"), "f32", None), {})


# The map above


def test_every_row_names_tests_that_are_there():
    lines = __doc__.split("\n\n")[2].splitlines()
    rows = [k for k, line in enumerate(lines) if not line.startswith(" ")]
    assert len(rows) == ROWS
    for start, end in zip(rows, [*rows[1:], len(lines)], strict=True):
        named = " ".join(lines[start + 1 : end]).split()
        assert named, lines[start]
        for file, test in (name.split("::") for name in named):
            folder = TESTS.parent if file.startswith("tests/") else TESTS / "unit"
            assert re.search(rf"def {test}\(", (folder / file).read_text()), f"{file}::{test}"


# Sizes


@pytest.mark.parametrize("name", ["img2img", "inpaint", "depth2img", "upscale"])
@pytest.mark.parametrize("size", [(75, 50), (65, 64), (300, 3)])
def test_every_task_gives_the_pictures_size_back(bundle, name, size):
    """Painted on a canvas of whole multiples, cropped to the size (times four) at the top left."""
    latent = replace(bundle.facts.latent, factor=4 if name == "upscale" else 8)
    bundle = of(bundle, latent=latent)
    mask = Image.new("L", size, 255) if name == "inpaint" else None
    given = Given((Image.new("RGB", size, "teal"),), mask=mask)
    request = Request(seed=0).completed(name, None)
    found = setup.set_up(tasks.TASKS[name], bundle, request, given, None).canvas
    times = 4 if name == "upscale" else 1
    assert found.size == (size[1] * times, size[0] * times)
    # in latent cells, of which the network takes multiples of 8
    assert (found.height // latent.factor) % 8 == 0 == found.height % latent.factor
    assert (found.width // latent.factor) % 8 == 0 == found.width % latent.factor
    painted = np.zeros((found.height, found.width, 3), np.uint8)
    painted[: size[1] * times, : size[0] * times] = 255
    assert found.crop(painted).min() == 255


@pytest.mark.parametrize(
    ("native", "size", "said"),
    [
        ((512, 512), (768, 768), "trained at 512x512: a picture of 768x768 may repeat"),
        ((768, 768), (512, 512), "trained at 768x768: a picture of 512x512 may look coarse"),
        ((512, 512), (512, 768), None),
        ((768, 768), (768, 768), None),
    ],
)
@pytest.mark.parametrize("name", ["txt2img", "img2img"])
def test_a_size_far_from_the_models_own_is_warned_of(bundle, native, size, said, name):
    bundle, task = of(bundle, native_size=native), tasks.TASKS[name]
    images = (Image.new("RGB", size),) if task.placed else ()
    request = Request(seed=0, width=size[0], height=size[1]).completed(task.name, native)
    warnings = setup.set_up(task, bundle, request, Given(images), None).warnings
    if said is None:
        assert warnings == []
    else:
        assert said in warnings[0]


def test_an_upscaler_has_no_size_of_its_own(bundle):
    given = Given((Image.new("RGB", (128, 128)),))
    request = Request(seed=0).completed("upscale", None)
    assert setup.set_up(tasks.TASKS["upscale"], bundle, request, given, None).warnings == []


def test_an_upscale_beyond_the_largest_side(bundle):
    bundle = of(bundle, latent=replace(bundle.facts.latent, factor=4))
    request = Request(seed=0).completed("upscale", None)
    given = Given((Image.new("RGB", (1032, 64)),))
    with pytest.raises(RequestError, match="4128x256 pixels; 4096 a side") as caught:
        setup.set_up(tasks.TASKS["upscale"], bundle, request, given, None)
    assert "resize the picture before" in caught.value.hint


def test_the_mark_needs_room(pipe):
    """256 x 256 pixels of area, whatever the shape."""
    small = pipe(width=255, height=256, steps=1, seed=0)
    assert "no invisible watermark: 255x256 is under 256x256 pixels" in small.warnings
    assert small.pictures[0].about["watermark"] == "picture too small"
    large = pipe(width=512, height=128, steps=1, seed=0)
    assert not [text for text in large.warnings if "watermark" in text]
    assert large.pictures[0].about["watermark"] == watermark.TEXT
    off = pipe(width=512, height=128, steps=1, seed=0, watermark=False)
    assert off.pictures[0].about["watermark"] == "off"
    marked = watermark.encode(np.asarray(off.image))
    np.testing.assert_array_equal(np.asarray(large.image), marked)


# Steps, strength, guidance


def test_the_references_depth2img_at_full_strength():
    """steps - 1 calls, the first at sub-step steps - 2 with a latent of noise alone; here all."""
    training = Training.scaled_linear(0.00085, 0.012, 1000)
    levels = schedule.make("reference", training, 50)
    compat = Request(compat="reference", seed=0).completed("depth2img", None)
    theirs = setup.shortened(levels, 1.0, "depth2img", compat)
    assert list(theirs.timesteps) == list(range(961, 0, -20))
    assert (theirs.start_scale, theirs.start_noise) == (0.0, 1.0)
    ours = setup.shortened(levels, 1.0, "depth2img", replace(compat, compat=None))
    assert len(ours) == 50


def test_the_references_depth2img_needs_two_steps():
    training = Training.scaled_linear(0.00085, 0.012, 1000)
    compat = Request(compat="reference", seed=0).completed("depth2img", None)
    with pytest.raises(RequestError, match="one step less") as caught:
        setup.shortened(schedule.make("reference", training, 1), 1.0, "depth2img", compat)
    assert "2 steps" in caught.value.hint


@pytest.mark.parametrize("sampler", solvers.SOLVERS)
def test_a_single_step_of_every_sampler(bundle, sampler):
    """DPM-Solver needs two in the reference. The network knows the picture, so one step is enough;
    what noise is left is that of the schedule's end (0.029)."""
    image = np.random.default_rng(0).standard_normal((4, 8, 16))
    fake = Fake(prediction="v", image=image)
    pipe = Pipeline(bundle, api.EngineSessions(bundle, fake, "f32", None), {})
    asked = {"prompt": "a fox", "sampler": sampler, "steps": 1, "seed": 3}
    if solvers.find(sampler).schedule == "leading":  # its one level is the last: timestep 1
        made = pipe(**asked)
        assert "begins at timestep 1, where a model expects a picture" in made.warnings[0]
        asked["schedule"] = "trailing"
    made = pipe(**asked)
    assert not [text for text in made.warnings if "begins at" in text]
    np.testing.assert_allclose(made.pictures[0].latent, image, rtol=0, atol=0.15)


def test_a_picture_may_begin_at_a_low_level(pipe):
    """As img2img does with a small strength: no warning."""
    image = Image.new("RGB", (128, 64), "teal")
    warnings = pipe(image=image, strength=0.2, steps=10, sampler="ddim", seed=0).warnings
    assert not [text for text in warnings if "begins at" in text]


def test_more_than_500_steps(pipe):
    assert len(pipe(steps=501, sampler="ddim", guidance=1.0, seed=0).timings.rows) == 501


@pytest.mark.parametrize("sampler", ["plms", "dpmpp_2m"])
def test_eta_is_refused_where_it_would_be_ignored(sampler):
    with pytest.raises(RequestError, match=rf"sampler '{sampler}' takes no eta") as caught:
        Request(sampler=sampler, eta=0.5)
    assert "ddim" in caught.value.hint


def test_eta_of_the_default_sampler_is_refused_too(pipe):
    with pytest.raises(RequestError, match="takes no eta"):
        pipe(eta=0.5, steps=2)


def test_guidance_of_zero_ignores_the_prompt(pipe):
    asked = {"negative_prompt": "a wolf", "guidance": 0.0, "steps": 3, "seed": 1}
    one, other = (pipe(prompt=prompt, **asked).pictures[0] for prompt in ("a fox", "a cat"))
    np.testing.assert_array_equal(one.latent, other.latent)
    guided = pipe(**{**asked, "prompt": "a fox", "guidance": 1.0}).pictures[0]
    assert np.abs(guided.latent - one.latent).max() > 0.1


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_steps_of_one_picture_do_not_move_the_next(bundle, sampler):
    """In the reference the second picture starts where the first one's generator stopped, so it
    depends on the steps of the first. Here its start is its own, read off before any step."""
    starts = []
    for steps in (3, 7):
        pipe = Pipeline(bundle, api.EngineSessions(bundle, Fake(prediction="v"), "f32", None), {})
        unet = pipe._sessions("unet", {"B": 2, "h": 8, "w": 16, "T": 77})
        seen = []
        call = type(unet).__call__

        def spy(self, feeds, call=call, seen=seen):
            if "sample" in feeds:
                seen.append(np.array(feeds["sample"][0]))
            return call(self, feeds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(unet), "__call__", spy)
            pipe(
                prompt="x", sampler=sampler, schedule="trailing", steps=steps, seed=5, count=2,
                guidance=2.0,
            )  # fmt: skip
        starts.append(seen[steps * solvers.find(sampler).calls])
    np.testing.assert_array_equal(*starts)


def test_a_picture_of_every_sampler_is_saved_with_its_settings(pipe, tmp_path):
    """DDIM's eta, which nobody gave, stopped the saving."""
    for sampler in solvers.SOLVERS:
        made = pipe(prompt="x", sampler=sampler, steps=1, seed=3).pictures[0]
        with Image.open(made.save(tmp_path / f"{sampler}.png")) as image:
            assert "Steps: 1" in image.info["parameters"]
