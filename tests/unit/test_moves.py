"""A run that is stopped, saved and gone on with; and what a request's options do to it.

On networks with known answers (backends.fake): no engine library, no torch.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.engine import state
from sdengine.engine.bundle import PreviewFacts, open_bundle
from sdengine.engine.errors import RequestError, UnknownName
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.ports import Probe
from sdengine.engine.request import Request


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


@pytest.fixture
def fake():
    return Fake(prediction="v")


@pytest.fixture
def pipe(bundle, fake):
    return Pipeline(bundle, api.EngineSessions(bundle, fake, "f32", None), {})


def stopped(pipe, after, **asked):
    """The state after some rows, through a file's bytes in the tests that save it."""
    kept: list[state.Saved] = []
    *_, result = pipe.stream(Request(**asked), on_state=kept.append, stop_after=after)
    assert not result.pictures
    assert len(kept) == after
    return kept[-1]


ASKED = {"prompt": "a fox", "steps": 6, "seed": 3, "guidance": 3.0}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "plms", "dpmpp_sde"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_run_is_the_whole_run(pipe, tmp_path, sampler, after):
    whole = pipe(**ASKED, sampler=sampler, count=2, batch_size=2)
    saved = stopped(pipe, after, **ASKED, sampler=sampler, count=2, batch_size=2)
    again = state.load(state.save(saved, tmp_path / "run.latents"))
    *_, result = pipe.stream(Request.from_dict(again.request), resume=again)
    assert len(result.timings.rows) == len(whole.timings.rows) - after
    for one, other in zip(whole.pictures, result.pictures, strict=True):
        np.testing.assert_array_equal(one.latent, other.latent)
        assert one.request == other.request


def test_a_run_saved_after_its_last_row_is_only_decoded(pipe):
    kept: list[state.Saved] = []
    *_, whole = pipe.stream(Request(**ASKED), on_state=kept.append)
    *_, result = pipe.stream(Request.from_dict(kept[-1].request), resume=kept[-1])
    assert not result.timings.rows
    np.testing.assert_array_equal(result.pictures[0].latent, whole.pictures[0].latent)


def test_inpainting_goes_on_with_its_pictures_and_refuses_others(pipe, rng):
    image = Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8))
    mask = Image.new("L", (128, 64), 255)
    asked = Request(**ASKED, strength=0.5)
    whole = pipe(asked, image=image, mask=mask)
    kept: list[state.Saved] = []
    list(pipe.stream(asked, image=image, mask=mask, on_state=kept.append, stop_after=2))
    request = Request.from_dict(kept[-1].request)
    *_, result = pipe.stream(request, image=image, mask=mask, resume=kept[-1])
    np.testing.assert_array_equal(whole.pictures[0].latent, result.pictures[0].latent)
    other = Image.new("RGB", (128, 64), "teal")
    with pytest.raises(RequestError, match="made with another image") as caught:
        list(pipe.stream(request, image=other, mask=mask, resume=kept[-1]))
    assert "same files" in caught.value.hint


def test_another_request_cannot_go_on(pipe):
    saved = stopped(pipe, 2, **ASKED)
    changed = Request.from_dict({**saved.request, "guidance": 4.0})
    with pytest.raises(RequestError, match=r"guidance is 3\.0 there, 4\.0 here") as caught:
        list(pipe.stream(changed, resume=saved))
    assert "--from-latents" in caught.value.hint


def test_each_picture_of_a_variation_turns_towards_another_seed(pipe):
    asked = {**ASKED, "guidance": 1.0, "variation_seed": 50, "variation_strength": 0.3}
    together = pipe(**asked, count=3).pictures
    assert [p.request.seed for p in together] == [3, 3, 3]
    assert [p.request.variation_seed for p in together] == [50, 51, 52]
    for one in together:
        np.testing.assert_array_equal(pipe(one.request).pictures[0].latent, one.latent)
    none = pipe(**{**asked, "variation_strength": 0.0}).pictures[0]
    plain = pipe(**{**ASKED, "guidance": 1.0}).pictures[0]
    np.testing.assert_array_equal(none.latent, plain.latent)


def test_a_preset_fills_what_is_left_open(pipe):
    request = Request(prompt="x", preset="fast", seed=0).completed("txt2img", (64, 128))
    preset = api.PRESETS["fast"]
    assert (request.steps, request.sampler) == (preset.steps, preset.sampler)
    assert request.cache == preset.cache
    own = Request(preset="fast", steps=3, cache=1, sampler="euler").completed("txt2img", (64, 128))
    assert (own.steps, own.cache, own.sampler, own.schedule) == (3, 1, "euler", "linspace")


def test_the_cost_counts_halves(pipe):
    assert pipe(**ASKED).cost == 6.0
    assert pipe(**{**ASKED, "guidance": 1.0}).cost == 3.0
    limited = pipe(**ASKED, guidance_interval=(0.0, 1.0), halves="apart")
    assert 3.0 < limited.cost < 6.0
    assert limited.pictures[0].about["cost"] == f"{limited.cost:.4g}"


def test_a_cache_needs_graphs_that_the_bundle_has(pipe):
    with pytest.raises(RequestError, match="has no graph shallow2") as caught:
        pipe(**ASKED, cache=2, cut=2)
    assert "--cache 1" in caught.value.hint


def test_explicit_levels_say_their_number(pipe):
    made = pipe(prompt="x", sigmas=(9.0, 2.0, 0.5, 0.0), sampler="euler", seed=0)
    assert len(made.timings.rows) == made.request.steps == 3
    made = pipe(prompt="x", timesteps=[999, 500], sampler="euler", seed=0)
    assert len(made.timings.rows) == made.request.steps == 2
    again = Request.from_dict(json.loads(json.dumps(made.pictures[0].request.to_dict())))
    np.testing.assert_array_equal(pipe(again).pictures[0].latent, made.pictures[0].latent)


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"sigmas": (1.0, 2.0)}, "number 2 of sigmas is 2", "largest first"),
        ({"sigmas": (9.0, 0.0), "timesteps": (999,)}, "both sigmas and timesteps", "one of the"),
        ({"variation_strength": 0.5}, "without a variation seed", "--variation-seed"),
        ({"guidance_interval": (5.0, 1.0)}, "from 5 to 1", "low then high"),
        ({"guidance_interval": (5.0,)}, "1 numbers, not 2", "2 numbers"),
        ({"guidance_scales": (5.0, 1.0)}, "2 guidance scales for 6 rows", "give 6"),
        ({"zero_snr": True, "sampler": "ddim", "schedule": "trailing"}, None, None),
        ({"prompt": "[a:b:3]", "prompt_weights": True}, "change with the steps", "brackets"),
        ({"prompt": "word " * 90, "long_prompt": True}, "exported for one", "export"),
        ({"solver": "none.json"}, "cannot read the solver", "JSON"),
    ],
)
def test_nonsense_is_refused_with_a_hint(pipe, fields, message, hint):
    if message is None:
        assert pipe(**{**ASKED, **fields}).pictures  # a v model may start without a picture
        return
    with pytest.raises(RequestError, match=message) as caught:
        pipe(**{**ASKED, **fields})
    assert hint in caught.value.hint


def test_prompt_weights_are_plain_text_unless_asked_for(pipe):
    def latent(prompt, **options):
        asked = {**ASKED, **options, "prompt": prompt}
        return pipe(**asked).pictures[0].latent

    np.testing.assert_array_equal(latent("a fox"), latent("a (fox:1.0)", prompt_weights=True))
    assert np.abs(latent("a fox") - latent("a (fox:1.0)")).max() > 0.1


def test_a_preview_follows_the_run(bundle, fake):
    matrix = tuple(map(tuple, np.eye(4, 3).tolist()))
    facts = replace(bundle.facts, preview=PreviewFacts(matrix, (0.0, 0.0, 0.0)))
    bundle = replace(bundle, facts=facts)
    pipe = Pipeline(bundle, api.EngineSessions(bundle, fake, "f32", None), {})
    guesses = []
    made = pipe(**{**ASKED, "guidance": 1.0}, on_step=lambda at: guesses.append(at.guess()))
    assert guesses[0].shape == (64, 128, 3)
    # the network is exact: it sees the picture at once, as far as it is not above 1
    final = np.clip(made.pictures[0].latent[:3], -1, 1).transpose(1, 2, 0)
    seen = guesses[0][::8, ::8] / 127.5 - 1
    np.testing.assert_allclose(seen, final, rtol=0, atol=0.15)


def test_another_tools_name_of_a_sampler(pipe):
    request = Request(sampler="DPM++ 2M Karras")
    assert (request.sampler, request.schedule) == ("dpmpp_2m", "karras")
    with pytest.raises(UnknownName):
        Request(sampler="DPM+++ 9M")


def test_a_presets_precision(bundle):
    def chosen(preset, precisions):
        probe = Probe(True, "", precisions=precisions)
        return api.preset_precision(bundle, "openvino", probe, preset)

    assert chosen("reference", ("bf16", "f32")) == "f32"
    assert chosen("exact", ("f32",)) == "f32"
    assert chosen("high", ("int8", "bf16", "f32")) == "int8"  # refused later, by name
    assert chosen("balanced", ("int8", "bf16", "f32")) == "bf16", "no int8 in this bundle"
    proved = replace(bundle.targets["openvino"], precisions=("int8", "bf16", "f32"))
    bundle = replace(bundle, targets={"openvino": proved})
    assert chosen("balanced", ("int8", "bf16", "f32")) == "int8"
    assert chosen("balanced", ("bf16", "f32")) == "bf16", "this backend has none"
    assert chosen("exact", ("int8", "bf16", "f32")) == "bf16"
    with pytest.raises(UnknownName):
        chosen("hihg", ("f32",))
