"""Guidance on a network of one line whose answer is known, and on the fake backend."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine.errors import NumericsError
from sdengine.engine.guidance import Conditions, Guidance
from sdengine.engine.spec import ComponentSpec, TensorSpec
from sdengine.engine.table import Row

B, SHAPE = 2, (2, 4, 6, 5)
SAMPLE = TensorSpec("sample", "float32", ("B", 4, "h", "w"))
FEATURES = TensorSpec("features0", "float32", ("B", 4, "h", "w"))


class Line:
    """out = sample[:, :4] * mean(text) + t / 1000 (+ labels); deep features are the product."""

    def __init__(self, log, held=None, name="full"):
        self.log, self.held, self.name = log, held or {}, name
        further = (FEATURES,) if name.startswith("shallow") else ()
        self.spec = ComponentSpec("unet", (SAMPLE, *further), ())

    def bind(self, feeds):
        return Line(self.log, {**self.held, **feeds}, self.name)

    def graph(self, name):
        return Line(self.log, self.held, name)

    def __call__(self, feeds):
        given = {**self.held, **feeds}
        self.log.append((self.name, len(given["sample"])))
        if self.name == "shallow0":
            product = given["features0"]
        else:
            text = given["encoder_hidden_states"].mean((1, 2))[:, None, None, None]
            product = given["sample"][:, :4] * text
        out = product + given["timestep"][:, None, None, None] / 1000
        if "class_labels" in given:
            out = out + given["class_labels"][:, None, None, None].astype(np.float32)
        out = out.astype(np.float32)
        return {"out_sample": out, **({"features0": product} if self.name == "deep" else {})}


@pytest.fixture
def log():
    return []


@pytest.fixture
def made(log, rng):
    """`made(**options) -> Guidance`, and the texts and the x that it is for."""
    texts = rng.standard_normal((2, B, 7, 3)).astype(np.float32)
    opened = []

    def make(**options):
        def open_session(component, dims, *, paired=False):
            opened.append((component, dims["B"]))
            assert paired == (dims["B"] == 2 * B), "both halves in one call"
            return Line(log)

        return Guidance(open_session, *texts, **options)

    make.texts, make.opened = texts, opened
    make.x = rng.standard_normal(SHAPE).astype(np.float32)
    return make


def row(index=0, guidance=5.0, graph="full", t=500.0):
    return Row(index, t, guidance, graph)


def expected(make, scale, t=500.0, x=None):
    """u + s (c - u), from the network's formula in float64."""
    x = make.x if x is None else x
    u, c = (
        x.astype(np.float64) * text.astype(np.float64).mean((1, 2))[:, None, None, None] + t / 1000
        for text in make.texts
    )
    return u + scale * (c - u), c


@pytest.mark.parametrize("halves", ["together", "apart"])
def test_both_halves(made, log, halves):
    found = made(halves=halves)(made.x, row(guidance=5.0))
    np.testing.assert_allclose(found, expected(made, 5.0)[0], atol=1e-5)
    assert log == [("full", 2 * B)] if halves == "together" else [("full", B), ("full", B)]


@pytest.mark.parametrize("halves", ["together", "apart"])
def test_halves_are_apart_or_together_to_the_bit(made, halves):
    """This network treats each row of a batch alike: no rounding may come in between."""
    np.testing.assert_array_equal(
        made(halves=halves)(made.x, row()), made(halves="together")(made.x, row())
    )


def test_apart_needs_one_shape_alone(made):
    """Guided and unguided rows run on one compiled network of batch B."""
    predict = made(halves="apart")
    for i, scale in enumerate((5.0, 1.0, 3.0)):
        np.testing.assert_allclose(
            predict(made.x, row(i, scale)), expected(made, scale)[0], atol=1e-5
        )
    assert set(made.opened) == {("unet", B)}
    assert len(made.opened) == 2, "each half binds its text once"


def test_one_half(made, log):
    found = made()(made.x, row(guidance=1.0))
    np.testing.assert_allclose(found, expected(made, 1.0)[1], atol=1e-6)
    assert log == [("full", B)]


@pytest.mark.parametrize("halves", ["together", "apart"])
@pytest.mark.parametrize("unlabelled", [None, np.array([7, 8])])
def test_labels_go_to_their_half(made, halves, unlabelled):
    labels = np.array([1, 2])
    predict = made(halves=halves, conditions=Conditions(labels=labels, unlabelled=unlabelled))
    without = labels if unlabelled is None else unlabelled
    beside = (without + 5.0 * (labels - without))[:, None, None, None]
    np.testing.assert_allclose(
        predict(made.x, row()), expected(made, 5.0)[0] + beside, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("halves", ["together", "apart"])
def test_shallow_takes_the_features_of_the_last_deep_row(made, log, halves, rng):
    """In this network they hold all of x and text: a shallow row answers for the deep row's x."""
    predict = made(halves=halves)
    assert predict.cached_from is None
    other = rng.standard_normal(SHAPE).astype(np.float32)
    for index, graph, x, source in (
        (0, "deep", made.x, made.x),
        (1, "shallow0", other, made.x),
        (2, "full", other, other),
        (3, "shallow0", other, made.x),
        (4, "deep", other, other),
        (5, "shallow0", made.x, other),
    ):
        found = predict(x, row(index, 5.0, graph, t=100.0 * index))
        wanted = expected(made, 5.0, 100.0 * index, source)[0]
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=str(index))
        assert predict.cached_from == (4 if index >= 4 else 0)


@pytest.mark.parametrize("halves", ["together", "apart"])
def test_a_shallow_row_may_run_fewer_halves(made, log, halves):
    predict = made(halves=halves)
    predict(made.x, row(0, 5.0, "deep"))
    found = predict(made.x * 0, row(1, 1.0, "shallow0"))
    np.testing.assert_allclose(found, expected(made, 1.0)[1], atol=1e-5)
    assert log[-1] == ("shallow0", B)


@pytest.mark.parametrize("halves", ["together", "apart"])
def test_but_never_more(made, halves):
    predict = made(halves=halves)
    predict(made.x, row(0, 1.0, "deep"))
    with pytest.raises(AssertionError, match="row 1 runs more halves than row 0 did"):
        predict(made.x, row(1, 5.0, "shallow0"))


def test_features_of_another_run_are_never_used(made):
    predict = made()
    with pytest.raises(AssertionError, match="row 0 is shallow, and no deep row ran before it"):
        predict(made.x, row(0, 5.0, "shallow0"))
    predict(made.x, row(3, 5.0, "deep"))
    with pytest.raises(AssertionError, match="features of row 3 are left from another run"):
        predict(made.x, row(1, 5.0, "shallow0"))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("halves", ["together", "apart"])
def test_rescale_in_closed_form(made, phi, halves):
    """Lin et al., equations 15 and 16, in float64; at phi = 1 the deviation is the cond half's."""
    guided, cond = expected(made, 7.5)
    axes = (1, 2, 3)
    matched = guided * (cond.std(axes, keepdims=True) / guided.std(axes, keepdims=True))
    wanted = phi * matched + (1 - phi) * guided
    found = made(halves=halves, rescale=phi)(made.x, row(guidance=7.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if phi == 1.0:
        np.testing.assert_allclose(found.std(axes), cond.std(axes), rtol=1e-5)


@pytest.mark.export
def test_rescale_is_that_of_diffusers(made):
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    import torch

    guided, cond = (torch.from_numpy(v.astype(np.float32)) for v in expected(made, 7.5))
    wanted = pipeline.rescale_noise_cfg(guided, cond, guidance_rescale=0.7).numpy()
    found = made(rescale=0.7)(made.x, row(guidance=7.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_rescale_leaves_unguided_rows_alone(made):
    found = made(rescale=0.7)(made.x, row(guidance=1.0))
    np.testing.assert_allclose(found, expected(made, 1.0)[1], atol=1e-6)


def test_nan_is_named(made):
    with pytest.raises(NumericsError, match=r"at step 3 \(timestep 500, guidance 5") as caught:
        made()(np.full(SHAPE, np.nan, np.float32), row(3))
    assert "--precision f32" in caught.value.hint
