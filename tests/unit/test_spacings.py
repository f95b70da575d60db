"""Spacings against numbers from elsewhere: publications, scipy, and formulas written out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sdengine.engine import schedule
from sdengine.engine.errors import RequestError
from sdengine.engine.schedule import Training

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
SIGMAS = np.sqrt((1 - TRAINING.alphas_cumprod) / TRAINING.alphas_cumprod)


def test_align_your_steps_are_the_published_numbers():
    """NVIDIA's ten steps for Stable Diffusion 1.5, to the three digits of its page."""
    made = schedule.make("align_your_steps", TRAINING, 10)
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    np.testing.assert_allclose(made.ratios, published, atol=3e-3)
    # and its timesteps, as diffusers lists them
    listed = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    np.testing.assert_allclose(made.timesteps, listed, atol=1.0)


def test_align_your_steps_interpolates_in_the_logarithm():
    made = schedule.make("align_your_steps", TRAINING, 20)
    coarse = schedule.make("align_your_steps", TRAINING, 10)
    np.testing.assert_allclose(made.ratios[:-1:2], coarse.ratios[:-1], rtol=1e-12)
    middle = np.sqrt(coarse.ratios[:-2] * coarse.ratios[1:-1])
    np.testing.assert_allclose(made.ratios[1:-2:2], middle, rtol=1e-12)


@pytest.mark.parametrize("shape", [0.6, 1.0, 2.5])
def test_beta_quantile_is_scipys(shape):
    stats = pytest.importorskip("scipy.stats")
    q = np.concatenate([np.linspace(0, 1, 41), [1e-6, 1 - 1e-6]])
    found = schedule.beta_quantile(q, shape)
    np.testing.assert_allclose(found, stats.beta.ppf(q, shape, shape), rtol=0, atol=1e-12)


def test_beta_quantile_of_known_values():
    """Arcsine law, shape 1/2: sin^2(pi q / 2); the uniform law, shape 1: q."""
    q = np.linspace(0, 1, 21)
    np.testing.assert_allclose(
        schedule.beta_quantile(q, 0.5), np.sin(np.pi * q / 2) ** 2, atol=1e-12
    )
    np.testing.assert_allclose(schedule.beta_quantile(q, 1.0), q, atol=1e-12)


def test_beta_is_dense_at_both_ends():
    """Ten steps, computed once with scipy 1.17: rint(999 * beta.ppf(1 - k / 10, 0.6, 0.6))."""
    stats = pytest.importorskip("scipy.stats")
    expected = np.rint(999 * stats.beta.ppf(1 - np.arange(10) / 10, 0.6, 0.6))
    made = schedule.make("beta", TRAINING, 10)
    assert made.timesteps.tolist() == expected.tolist()
    gaps = -np.diff(made.timesteps)
    assert gaps[0] < gaps[4] > gaps[-1]


def test_simple_and_sgm_uniform_by_their_definitions():
    made = schedule.make("simple", TRAINING, 7)
    listed = [SIGMAS[-(1 + int(k * 1000 / 7))] for k in range(7)] + [0.0]
    np.testing.assert_allclose(made.ratios, listed, rtol=1e-12)
    made = schedule.make("sgm_uniform", TRAINING, 9)
    assert made.timesteps.tolist() == pytest.approx([999 * (9 - k) / 9 for k in range(9)])
    np.testing.assert_allclose(made.ratios[[0, 3]], SIGMAS[[999, 666]], rtol=1e-12)


def test_exponential_is_even_in_the_logarithm():
    made = schedule.make("exponential", TRAINING, 12)
    steps = np.diff(np.log(made.ratios[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-12)
    np.testing.assert_allclose(made.ratios[[0, 11, 12]], [SIGMAS[-1], SIGMAS[0], 0.0], rtol=1e-12)


def test_quad_is_the_references():
    """reference-spec 3.3: (linspace(0, sqrt 800, S)^2) truncated, plus 1; ends at timestep 0."""
    made = schedule.make("quad", TRAINING, 10)
    listed = [int(v**2) + 1 for v in np.linspace(0, np.sqrt(800), 10)]
    assert made.timesteps.tolist() == listed[::-1]
    assert made.ratios[-1] == pytest.approx(SIGMAS[0])
    assert len(schedule.make("quad", TRAINING, 60)) < 60  # small timesteps coincide


def test_lcm_asks_timesteps_of_the_distillation():
    made = schedule.make("lcm", TRAINING, 4)
    assert made.timesteps.tolist() == [999, 759, 499, 259]  # Luo et al.'s four steps
    assert set(schedule.make("lcm", TRAINING, 17).timesteps) <= set(range(19, 1000, 20))


@pytest.mark.export
def test_zero_snr_is_diffusers_rescale():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).numpy()
    ours = TRAINING.zero_snr().alphas_cumprod
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-4, atol=1e-9)
    assert theirs[-1] == 0
    assert ours[-1] == 2.0**-24
    assert ours[0] == pytest.approx(TRAINING.alphas_cumprod[0], rel=1e-12)
    trailing = schedule.make("trailing", TRAINING.zero_snr(), 10)
    assert trailing.alphas[0] == pytest.approx(2.0**-12)


def test_explicit_sigmas_and_timesteps():
    made = schedule.from_sigmas(TRAINING, [14.6, 3.0, 0.5, 0.1])
    np.testing.assert_allclose(made.ratios, [14.6, 3.0, 0.5, 0.1], rtol=1e-12)
    assert made.sigmas[-1] > 0
    assert schedule.from_sigmas(TRAINING, [2.0, 0.0]).sigmas[-1] == 0
    made = schedule.from_timesteps(TRAINING, [999, 500.5, 20])
    assert made.timesteps.tolist() == [999, 500.5, 20]
    middle = np.sqrt(SIGMAS[500] * SIGMAS[501])
    np.testing.assert_allclose(made.ratios, [SIGMAS[999], middle, SIGMAS[20], 0.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "says", "hints"),
    [
        ([3.0], "1 numbers; at least 2", "commas"),
        ([3.0, 3.0, 0.0], "number 2 of sigmas is 3", "largest first"),
        ([3.0, -1.0], "number 2 of sigmas is -1", "largest first"),
        ([float("nan"), 0.0], "number 1 of sigmas is nan", "largest first"),
        ([float("inf"), 1.0], "number 1 of sigmas is inf", "largest first"),
        ([80.0, 1.0, 0.0], "sigmas holds 80; this model knows 0.02888 to 14.76", "sigma / alpha"),
        ([1.0, 0.001, 0.0], "sigmas holds 0.001", "only the last may be 0"),
    ],
)
def test_sigmas_that_make_no_sense(values, says, hints):
    with pytest.raises(RequestError) as caught:
        schedule.from_sigmas(TRAINING, values)
    assert says in caught.value.message
    assert hints in caught.value.hint


@pytest.mark.parametrize(
    ("values", "says", "hints"),
    [
        ([], "0 numbers; at least 1", "commas"),
        ([10, 20], "number 2 of timesteps is 20", "largest first"),
        ([1000, 20], "timesteps holds 1000; the last one of this model is 999", "999 down to 0"),
    ],
)
def test_timesteps_that_make_no_sense(values, says, hints):
    with pytest.raises(RequestError) as caught:
        schedule.from_timesteps(TRAINING, values)
    assert says in caught.value.message
    assert hints in caught.value.hint
