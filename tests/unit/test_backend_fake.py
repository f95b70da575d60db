"""The fake networks must have the answers that they promise: closed forms, and golden alphas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdengine.backends.fake import Fake, picture
from sdengine.engine.errors import BackendError
from sdengine.engine.spec import Component, ComponentSpec, Graph, Profile, TensorSpec

F = "float32"
FEATURES = TensorSpec("features1", F, ("B", 6, "h", "w"))
SPECS = {
    "text_encoder": (
        [TensorSpec("input_ids", "int64", ("B", 77))],
        [TensorSpec("last_hidden_state", F, ("B", 77, 16))],
    ),
    "unet": (
        [
            TensorSpec("sample", F, ("B", 5, "h", "w")),
            TensorSpec("timestep", F, ("B",)),
            TensorSpec("encoder_hidden_states", F, ("B", 77, 16)),
        ],
        [TensorSpec("out_sample", F, ("B", 4, "h", "w"))],
    ),
    "vae_encoder": (
        [TensorSpec("image", F, ("B", 3, "H", "W"))],
        [TensorSpec("moments", F, ("B", 8, "h", "w"))],
    ),
    "vae_decoder": (
        [TensorSpec("latent", F, ("B", 4, "h", "w"))],
        [TensorSpec("image", F, ("B", 3, "H", "W"))],
    ),
    "depth": ([TensorSpec("image", F, ("B", 3))], [TensorSpec("depth", F, ("B", 3))]),
}


def load(backend, name):
    inputs, outputs = map(tuple, SPECS[name])
    graphs = {"full": Graph("full", Path("full.onnx"), "", inputs, outputs)}
    if name == "unet":
        deep = (*outputs, FEATURES)
        graphs["deep"] = Graph("deep", Path("deep.onnx"), "", inputs, deep)
        shallow = (*inputs, FEATURES)
        graphs["shallow1"] = Graph("shallow1", Path("shallow1.onnx"), "", shallow, outputs)
    spec = ComponentSpec(name, inputs, outputs)
    component = Component(spec, graphs, Path("weights.safetensors"), "", {}, "")
    return backend.load(component, Profile())


@pytest.fixture(scope="module")
def levels(golden):
    """t -> alpha, sigma of the reference's float64 betas."""
    betas = np.array(golden("schedules")[0]["beta_schedules"]["sd"]["betas_float64"])
    products = np.cumprod(1 - betas)
    return np.sqrt(products), np.sqrt(1 - products)


def unet_feeds(x, t, text):
    pad = np.zeros_like(x[:, :1])  # an inpainting mask, which it must not look at
    return {
        "sample": np.concatenate([x, pad], axis=1).astype(np.float32),
        "timestep": np.array(t, np.float32),
        "encoder_hidden_states": text,
    }


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_unet_is_exact_for_the_picture_of_the_text(prediction, levels, rng):
    """x = alpha c + sigma e must give e, or v = alpha e - sigma c, for any noise e."""
    unet = load(Fake(prediction), "unet")
    text = rng.standard_normal((2, 77, 16)).astype(np.float32)
    c, e = picture(text, (4, 8, 16)), rng.standard_normal((2, 4, 8, 16))
    for t in (1, 500, 999):
        alpha, sigma = levels[0][t], levels[1][t]
        out = unet(unet_feeds(alpha * c + sigma * e, [t, t], text))["out_sample"]
        wanted = e if prediction == "eps" else alpha * e - sigma * c
        np.testing.assert_allclose(out, wanted, atol=1e-5 / sigma)


def test_unet_takes_fractional_times(levels, rng):
    """Between two levels, log alpha is linear in t: DPM-Solver's own interpolation."""
    unet = load(Fake(), "unet")
    text = rng.standard_normal((1, 77, 16)).astype(np.float32)
    c, e = picture(text, (4, 8, 8)), rng.standard_normal((1, 4, 8, 8))
    alpha = np.sqrt(levels[0][500] * levels[0][501])
    x = alpha * c + np.sqrt(1 - alpha**2) * e
    np.testing.assert_allclose(unet(unet_feeds(x, [500.5], text))["out_sample"], e, atol=1e-5)


def test_unet_for_one_picture_and_one_noise(rng):
    c, e = rng.standard_normal((2, 4, 8, 8))
    text = np.zeros((1, 77, 16), np.float32)
    unet = load(Fake("eps", image=c, noise=e), "unet")
    x = rng.standard_normal((1, 4, 8, 8))
    np.testing.assert_allclose(unet(unet_feeds(x, [3], text))["out_sample"][0], e, atol=1e-6)


def test_text_depends_on_every_id_and_its_place(rng):
    text = load(Fake(), "text_encoder")
    ids = rng.integers(0, 49408, (1, 77))
    first = text({"input_ids": ids})["last_hidden_state"]
    np.testing.assert_array_equal(text({"input_ids": ids})["last_hidden_state"], first)
    for place in (0, 40, 76):
        other = ids.copy()
        other[0, place] += 1
        assert np.abs(text({"input_ids": other})["last_hidden_state"] - first).max() > 0.1
    assert np.abs(text({"input_ids": ids[:, ::-1]})["last_hidden_state"] - first).max() > 0.1


def test_encoder_undoes_decoder(rng):
    latent = rng.uniform(-1, 1, (2, 4, 8, 16)).astype(np.float32)
    image = load(Fake(), "vae_decoder")({"latent": latent})["image"]
    assert image.shape == (2, 3, 64, 128)
    np.testing.assert_allclose(image[:, :, ::8, ::8], np.tanh(latent[:, :3]), atol=1e-6)
    moments = load(Fake(), "vae_encoder")({"image": image})["moments"]
    np.testing.assert_allclose(moments[:, :3], latent[:, :3], atol=1e-5)
    assert (moments[:, 4:] == -30).all(), "no noise in the sample"


def test_deep_features_are_the_picture_and_shallow_looks_at_nothing_else(levels, rng):
    """One text's features make the other text's network answer for the first one's picture."""
    backend = Fake()
    unet = load(backend, "unet")
    text, other = rng.standard_normal((2, 2, 77, 16)).astype(np.float32)
    e, alpha, sigma = rng.standard_normal((2, 4, 8, 16)), levels[0][500], levels[1][500]
    x = alpha * picture(text, (4, 8, 16)) + sigma * e
    deep = unet.graph("deep")(unet_feeds(x, [500, 500], text))
    np.testing.assert_allclose(deep["out_sample"], e, atol=1e-5)
    np.testing.assert_allclose(deep["features1"][:, :4], picture(text, (4, 8, 16)), atol=1e-6)
    feeds = {**unet_feeds(x, [500, 500], other), "features1": deep["features1"]}
    np.testing.assert_allclose(unet.graph("shallow1")(feeds)["out_sample"], e, atol=1e-5)
    assert backend.calls == {"unet/deep": 1, "unet/shallow1": 1}


def test_calls_are_counted():
    backend = Fake()
    text = load(backend, "text_encoder")
    for _ in range(3):
        text({"input_ids": np.zeros((1, 77), np.int64)})
    assert backend.calls == {"text_encoder": 3}


def test_an_unknown_component():
    with pytest.raises(BackendError, match="fake has no answers for 'depth'") as caught:
        load(Fake(), "depth")
    assert "unet" in caught.value.hint
