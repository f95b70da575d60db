"""The pipeline on networks with known answers: no engine library, no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdengine import api
from sdengine.backends.fake import Fake, picture
from sdengine.engine import solvers
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import NumericsError, RequestError, UnknownName
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.request import Request


def sibling(name: str):
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vocabulary() -> Path:
    """In the installed open_clip, which need not be imported for it."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose graphs nobody reads: v-prediction, native size 64 x 128."""
    sibling("tiny_bundle").write(tmp_path / "fake")
    return replace(open_bundle(tmp_path / "fake"), tokenizer_file=vocabulary())


@pytest.fixture
def fake():
    return Fake(prediction="v")


@pytest.fixture
def pipe(bundle, fake):
    sessions = api.EngineSessions(bundle, fake, "f32", None)
    return Pipeline(bundle, sessions, {"backend": "fake", "precision": "f32"})


@pytest.mark.parametrize("sampler", solvers.SOLVERS)
def test_every_sampler_ends_at_the_picture_of_the_text(pipe, sampler):
    """The network is exact for one picture, and guidance between equal halves changes nothing."""
    result = pipe(prompt="a fox", negative_prompt="a fox", sampler=sampler, steps=12, seed=3)
    (made,) = result.pictures
    text = pipe._sessions("text_encoder", {"B": 1})(
        {"input_ids": np.array([pipe._texts._tokenizer.encode("a fox").ids])}
    )["last_hidden_state"]
    end = solvers.find(sampler).schedule in ("leading", "uniform")  # sigma 0.029 is left
    expected = picture(text, (4, 8, 16))[0]
    np.testing.assert_allclose(made.latent, expected, rtol=0, atol=0.15 if end else 2e-3)
    assert made.image.size == (128, 64)


@pytest.mark.parametrize("sampler", [{}, {"sampler": "ddim", "eta": 1.0}], ids=str)
def test_one_seed_one_picture_whatever_the_batch(pipe, sampler):
    """Ancestral ones too: each picture draws its rows' noise from its own stream, in order."""
    asked = {"prompt": "a cat", "steps": 3, "guidance": 4.0, **sampler}
    together = pipe(**asked, seed=5, count=4, batch_size=3)
    alone = [pipe(**asked, seed=5 + k) for k in range(4)]
    assert [p.request.seed for p in together.pictures] == [5, 6, 7, 8]
    for one, many in zip(alone, together.pictures, strict=True):
        np.testing.assert_allclose(one.pictures[0].latent, many.latent, rtol=0, atol=1e-5)
    assert np.ptp([p.latent.mean() for p in together.pictures]) > 0


def test_each_picture_names_the_request_that_makes_it_again(pipe):
    second = pipe(prompt="a cat", steps=3, count=2, seed=9).pictures[1]
    again = pipe(second.request).pictures[0]
    assert again.request == second.request
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(second.image))


def test_a_drawn_seed_is_reported(pipe):
    first, other = (pipe(prompt="x", steps=1).request.seed for _ in range(2))
    assert 0 <= first < 2**32
    assert first != other


def test_guidance_of_one_runs_one_half(pipe, fake):
    pipe(prompt="a fox", steps=4, guidance=1.0, seed=0)
    session = pipe._sessions
    assert {key[1].dims["B"] for key in session._open if key[0] == "unet"} == {1}
    pipe(prompt="a fox", steps=4, guidance=1.5, seed=0)
    assert {key[1].dims["B"] for key in session._open if key[0] == "unet"} == {1, 2}
    assert fake.calls["unet"] == 8


def test_guidance_is_u_plus_s_times_c_minus_u(pipe):
    """One step that lands on sigma 0 gives x0, which is linear in the guided output."""

    def latent(**fields):
        asked = {"prompt": "a fox", "seed": 1, "steps": 1, "schedule": "trailing", **fields}
        return pipe(**asked).pictures[0].latent.astype(np.float64)

    cond, uncond = latent(guidance=1.0), latent(guidance=0.0, negative_prompt="a wolf")
    guided = latent(guidance=3.0, negative_prompt="a wolf")
    np.testing.assert_allclose(guided, uncond + 3.0 * (cond - uncond), rtol=0, atol=1e-3)


def test_another_size_is_made_larger_cropped_and_said(pipe):
    result = pipe(prompt="x", steps=1, width=100, height=70, seed=0)
    assert result.image.size == (100, 70)
    assert result.pictures[0].latent.shape == (4, 16, 16)
    assert "128x128" in result.warnings[0]


def test_a_long_prompt_is_cut_and_what_was_cut_is_shown(pipe):
    result = pipe(prompt="word " * 80 + "zebra", steps=1, seed=0)
    assert "zebra" in result.warnings[0]


def test_the_reference_spacing_says_how_many_steps_it_runs(pipe):
    result = pipe(prompt="x", steps=30, schedule="reference", sampler="ddim", seed=0)
    assert "31 steps, not 30" in result.warnings[0]
    assert len(result.timings.rows) == 31


def test_progress_counts_network_calls(pipe):
    seen = []
    pipe(prompt="x", steps=3, count=2, seed=0, on_step=seen.append)
    assert [(p.picture, p.pictures, p.step, p.steps) for p in seen] == [
        (k, 2, i, 3) for k in range(2) for i in (1, 2, 3)
    ]


def test_only_four_shapes_of_a_network_stay_open(pipe):
    for width in (64, 128, 192, 256, 320, 384):
        pipe(prompt="x", steps=1, width=width, height=64, seed=0, guidance=1.0)
    held = [key[1].dims["w"] for key in pipe._sessions._open if key[0] == "unet"]
    assert held == [24, 32, 40, 48]


def test_nan_stops_the_run_and_names_the_step(bundle):
    fake = Fake(prediction="v", image=np.full((4, 8, 16), np.nan))
    pipe = Pipeline(bundle, api.EngineSessions(bundle, fake, "f32", None), {})
    with pytest.raises(NumericsError, match=r"UNet .* step 0") as caught:
        pipe(prompt="x", steps=2, seed=0)
    assert "--precision f32" in caught.value.hint


def test_a_model_of_another_task_is_refused_by_name(bundle, fake):
    facts = replace(bundle.facts, variant="inpainting")
    pipe = Pipeline(replace(bundle, facts=facts), api.EngineSessions(bundle, fake, "f32", None), {})
    with pytest.raises(RequestError, match="an inpainting model, which needs more") as caught:
        pipe(prompt="x")
    assert "--image and --mask" in caught.value.hint
    assert not fake.calls


def test_a_request_and_keywords_are_refused(pipe):
    with pytest.raises(RequestError, match="both a Request and steps"):
        pipe(Request("x"), steps=3)


def test_an_unknown_keyword_names_the_nearest(pipe):
    with pytest.raises(UnknownName) as caught:
        pipe(prompt="x", step=3)
    assert "'steps'" in caught.value.hint


def test_the_picture_file_holds_the_request(pipe, tmp_path):
    from sdengine.engine.metadata import read_metadata

    made = pipe(prompt="a fox", steps=2, seed=11).pictures[0]
    read = read_metadata(made.save(tmp_path / "fox.png"))
    assert Request.from_dict(read.request) == made.request
    assert "Seed: 11" in read.parameters
    assert "Steps: 2" in read.parameters


def test_a_run_that_the_caller_stops_leaves_the_pipeline_as_it_was(pipe, fake):
    asked = {"prompt": "a fox", "steps": 4, "seed": 3, "sampler": "plms"}
    whole = pipe(**asked).pictures[0].latent

    class StopHereError(Exception):
        pass

    for last in (1, 2, 4):
        fake.calls.clear()

        def stop(progress, last=last):
            if progress.step == last:
                raise StopHereError

        with pytest.raises(StopHereError):
            pipe(**asked, on_step=stop)
        assert (fake.calls["unet"], fake.calls["vae_decoder"]) == (last, 0)
        np.testing.assert_array_equal(pipe(**asked).pictures[0].latent, whole)
