"""Whole text-to-image chains of the reference on its tiny checkpoint: ids, text, latents, picture.

The chain runs on OpenVINO in float32, from an exported bundle: all between a checkpoint and a
picture is in it. Start latents are the reference's, since it drew them from a generator of its own.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine import images, latents, schedule, solvers
from sdengine.engine.bundle import open_bundle
from sdengine.engine.guidance import Guidance
from sdengine.engine.loop import denoise
from sdengine.engine.schedule import Training
from sdengine.engine.tokenizer import Tokenizer

pytestmark = [pytest.mark.export, pytest.mark.ov]

# our sampler and schedule, the reference's result, slack beside 5 times its float32 uncertainty
RUNS = {
    "ddim": ("ddim", "reference", "out.latent", 2e-5),
    "plms": ("plms", "reference", "out.latent_plms", 2e-5),
    "dpm": ("dpmpp_2m", "uniform", "out.latent_dpm", 2e-4),
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def sessions(bundle):
    opened = api.EngineSessions(bundle, backends.get("openvino"), "f32", 1)
    yield opened
    opened.close()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("run", RUNS)
def test_txt2img(golden, bundle, sessions, prediction, run):
    case, arrays = golden(f"pipeline_txt2img_{prediction}")
    sampler, spacing, result, slack = RUNS[run]
    if result not in arrays:
        assert (run, prediction) == ("plms", "v")  # the reference has no PLMS for v models
        return
    settings, facts = case["settings"], bundle.facts
    tokenizer = Tokenizer(bundle.tokenizer_file, facts.tokenizer)
    prompts = (settings["negative_prompt"], settings["prompt"])
    ids = np.array([tokenizer.encode(p).ids for p in prompts])
    np.testing.assert_array_equal(ids, [arrays["in.ids_uncond"][0], arrays["in.ids"][0]])

    text = sessions("text_encoder", {"B": 2})({"input_ids": ids})["last_hidden_state"]
    expected = np.concatenate([arrays["out.context_uncond"], arrays["out.context"]])
    np.testing.assert_allclose(text, expected, rtol=0, atol=1e-4)

    noise = facts.schedule
    training = Training.scaled_linear(noise.beta_start, noise.beta_end, noise.timesteps)
    levels = schedule.make(spacing, training, settings["steps"])
    table = solvers.make(sampler, levels, prediction).guided(settings["guidance"])
    predict = Guidance(sessions, text[:1], text[1:])
    *_, last = denoise(table, predict, arrays["in.x_T"])
    uncertain = case["float32_noise"]["latent"]["max_abs"]
    np.testing.assert_allclose(last.x, arrays[result], rtol=0, atol=5 * uncertain + slack)

    if run == "ddim":
        decoded = latents.decode(sessions, last.x[0], facts.latent.scale)
        pixels = images.to_uint8(decoded).astype(int)
        assert np.abs(pixels - arrays["out.image_u8"][0].astype(int)).max() <= 1
