"""Rough pictures of latents, and the picture that a network has in mind at a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdengine.engine import schedule, solvers
from sdengine.engine.bundle import PreviewFacts
from sdengine.engine.loop import denoise
from sdengine.engine.preview import predicted, preview
from sdengine.engine.schedule import Training

FACTS = PreviewFacts(matrix=((1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, -1.0), (0.0, 0.0, 0.0)),
                     bias=(0.0, 0.0, 0.5))  # fmt: skip
TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)


def test_by_hand():
    latent = np.zeros((4, 2, 3), np.float32)
    latent[:, 0, 2] = [1, -1, 0.5, 9]
    latent[:, 1, 0] = [-7, 7, 0, 0]  # beyond black and white
    got = preview(latent, FACTS)
    assert (got.shape, got.dtype) == ((2, 3, 3), np.uint8)
    assert got[0, 0].tolist() == [128, 128, 191]
    assert got[0, 2].tolist() == [255, 64, 128]
    assert got[1, 0].tolist() == [0, 255, 191]


def test_enlarged_cells_are_squares():
    latent = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    small, large = preview(latent, FACTS), preview(latent, FACTS, enlarge=8)
    assert large.shape == (16, 24, 3)
    for y in range(16):
        for x in range(24):
            assert (large[y, x] == small[y // 8, x // 8]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_it_never_fails(value):
    assert preview(np.full((4, 2, 2), value, np.float32), FACTS).shape == (2, 2, 3)


@pytest.mark.parametrize("prediction", ["eps", "v"])
# what draws noise of its own leaves the line
@pytest.mark.parametrize(
    "name", [n for n, s in solvers.SOLVERS.items() if not (s.noisy or s.default_eta)]
)
def test_an_exact_network_has_its_picture_in_mind_at_every_row(name, prediction):
    """Closed form: x = alpha c + sigma e, whatever the prediction and the solver's quantity."""
    table = solvers.make(name, schedule.make("leading", TRAINING, 7), prediction)
    c, e = np.random.default_rng(2).standard_normal((2, 1, 4, 3, 3))

    def predict(x, row):
        alpha, sigma = table.alphas[row.index], table.sigmas[row.index]
        return e if prediction == "eps" else alpha * e - sigma * c

    x = table.alphas[0] * c + table.sigmas[0] * e
    for step in denoise(table, predict, x):
        np.testing.assert_allclose(predicted(table, step), c, rtol=0, atol=1e-9)


def test_in_float32_it_stays_float32():
    table = solvers.make("ddim", schedule.make("leading", TRAINING, 3), "v")
    x = np.ones((1, 4, 2, 2), np.float32)
    for step in denoise(table, lambda x, row: x, x):
        assert predicted(table, step).dtype == np.float32


def test_noise_alone_gives_the_mean_picture():
    table = solvers.make("ddim", schedule.make("leading", TRAINING, 3), "v")
    blind = replace(table, alphas=np.array([0.0, *table.alphas[1:]]))
    step = next(denoise(blind, lambda x, row: x, np.ones((1, 4, 2, 2), np.float32)))
    np.testing.assert_array_equal(predicted(blind, step), np.zeros((1, 4, 2, 2)))
