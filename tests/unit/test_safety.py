"""What becomes of a picture that the bundle's classifier objects to."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdengine.engine import safety

CONFIG = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "threshold": 0.5}


class Classifier:
    """Says how red a picture is; keeps what it was shown."""

    def __init__(self):
        self.shown = None

    def __call__(self, component, dims):
        assert (component, dims) == ("safety", {"B": 1})
        return self.answer

    def answer(self, feeds):
        self.shown = feeds["image"]
        return {"unsafe": (self.shown[:, 0].mean(axis=(1, 2)) + 2) / 4}


def picture(colour):
    image = Image.new("RGB", (64, 48), colour)
    image.paste("white", (10, 10, 20, 20))
    return image


@pytest.mark.parametrize(
    ("colour", "mode", "word"),
    [("red", "mark", "marked"), ("red", "block", "blocked"), ("navy", "block", "passed")],
)
def test_the_verdict_is_the_classifiers(colour, mode, word):
    image, classifier = picture(colour), Classifier()
    verdict = safety.judge(image, mode, classifier, CONFIG)
    assert verdict.word.startswith(word)
    assert verdict.objected == (word != "passed")
    changed = not np.array_equal(np.asarray(verdict.image), np.asarray(image))
    assert changed == (word == "blocked")
    # what the classifier is shown: its size, normalised by its own mean and deviation
    assert classifier.shown.shape == (1, 3, 16, 16)
    assert classifier.shown.dtype == np.float32
    corner = 2.0 if colour == "red" else -2.0
    np.testing.assert_allclose(classifier.shown[0, 0, -1, -1], corner, atol=1e-5)


def test_off_and_a_bundle_without_one_ask_nobody():
    image = picture("red")
    for mode, config, word in (("off", CONFIG, "off"), ("block", None, safety.NONE)):
        verdict = safety.judge(image, mode, None, config)  # type: ignore[arg-type]
        assert (verdict.image, verdict.word, verdict.objected) == (image, word, False)


def test_an_answer_that_is_no_number_objects():
    """NaN is not under the threshold."""
    verdict = safety.judge(
        picture("red"), "block", lambda *_: lambda _: {"unsafe": np.array([np.nan])}, CONFIG
    )
    assert verdict.objected


def test_a_blocked_picture_is_not_black_and_shows_nothing(rng):
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    noise.paste("black", (0, 0, 32, 64))
    hidden = np.asarray(safety.unrecognisable(noise), float)
    assert hidden.max() > 60
    assert np.abs(np.diff(hidden, axis=1)).max() < 20  # no edge is left
