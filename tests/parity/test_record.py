"""The recorded run is a real one: its steps chain as DDIM says, and sizes are the model's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdengine.export.components import parts
from sdengine.export.record import GUIDANCE, LEVELS, STEPS, loaded, record
from sdengine.export.weights_file import write_weights

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def weights(mini, mini_parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, part in mini_parts.items():
        write_weights(folder / name, [mini.tensors[n] for n in part.tensor_names()])
    return {name: folder / name for name in mini_parts}


@pytest.fixture(scope="module")
def ids():
    ids = np.zeros((2, 77), np.int64)
    ids[:, :4] = [[49406, 49407, 0, 0], [49406, 320, 3086, 49407]]
    return ids


def recorded(mini, weights, ids, **facts):
    seen = []
    changed = replace(mini.facts, **facts)
    described = parts(changed, mini.configs)
    cases = record(described, weights, changed, ids, lambda text, share: seen.append(share))
    assert seen == sorted(seen)
    return {name: {c.name: c for c in found} for name, found in cases.items()}


def test_levels_and_shapes(mini, weights, ids):
    cases = recorded(mini, weights, ids)
    unet = cases["unet"]
    assert list(unet) == ["early", "middle", "late"]
    times = [c.feeds["timestep"][0] for c in unet.values()]
    assert times == sorted(times, reverse=True)
    assert times[0] == 999
    assert all(c.feeds["sample"].shape == (2, 4, 16, 16) for c in unet.values())
    assert cases["vae_decoder"]["picture"].outputs["image"].shape == (2, 3, 32, 32)
    picture = cases["vae_encoder"]["picture"].feeds["image"]
    assert picture.min() >= -1
    assert picture.max() <= 1
    for found in cases.values():
        for case in found.values():
            assert all(np.isfinite(x).all() for x in case.outputs.values())


def test_native_size_is_one_case_more(mini, weights, ids, monkeypatch):
    monkeypatch.setattr("sdengine.export.record.SMALL_SIDE", 16)
    cases = recorded(mini, weights, ids, native_size=(32, 24))
    assert cases["unet"]["early"].feeds["sample"].shape == (2, 4, 8, 8)
    assert cases["unet"]["native"].feeds["sample"].shape == (2, 4, 16, 12)
    assert cases["vae_decoder"]["native"].outputs["image"].shape == (1, 3, 32, 24)
    assert cases["vae_encoder"]["native"].outputs["moments"].shape == (1, 8, 16, 12)
    assert cases["text_encoder"].keys() == {"prompts"}


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_run_is_ddim(mini, mini_parts, weights, ids, prediction):
    """Reference: an own loop in float64 over the same network, by the textbook."""
    cases = recorded(mini, weights, ids, prediction=prediction)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)
    times = [round(t) for t in np.linspace(999, 1000 // STEPS, STEPS)]
    hidden = torch.from_numpy(cases["text_encoder"]["prompts"].outputs["last_hidden_state"])
    x = torch.from_numpy(cases["unet"]["early"].feeds["sample"][:1]).double()
    with loaded(mini_parts["unet"], weights["unet"]) as unet, torch.no_grad():
        unet = unet.double()
        for i, t in enumerate(times):
            if i in LEVELS:
                kept = cases["unet"][LEVELS[i]].feeds["sample"][0]
                np.testing.assert_allclose(kept, x[0].numpy(), atol=2e-4 * float(x.std()))
            both = x.repeat(2, 1, 1, 1)
            out = unet(both, torch.full((2,), float(t)).double(), hidden.double())
            out = out[:1] + GUIDANCE * (out[1:] - out[:1])
            a, s = bar[t].sqrt(), (1 - bar[t]).sqrt()
            clean = a * x - s * out if prediction == "v" else (x - s * out) / a
            noise = a * out + s * x if prediction == "v" else out
            after = bar[times[i + 1]] if i + 1 < STEPS else torch.tensor(1.0).double()
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
    last = cases["vae_decoder"]["picture"].feeds["latent"][1] * mini.facts.latent.scale
    np.testing.assert_allclose(last, x[0].numpy(), atol=1e-3 * float(x.std()))


def test_memory_is_given_back(mini_parts, weights):
    with loaded(mini_parts["unet"], weights["unet"]) as network:
        assert all(p.dtype == torch.float32 for p in network.parameters())
        kept = network
    assert all(p.is_meta for p in kept.parameters())
