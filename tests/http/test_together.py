"""Requests of several clients in one batch: each gets the picture that it would get alone."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api
from sdengine.engine.errors import RequestError
from sdengine.engine.request import Request


@pytest.fixture(scope="module")
def pipe():
    with api.load("emoji", threads=1, precision="f32") as pipe:
        yield pipe


def test_a_picture_does_not_know_who_else_was_in_the_batch(pipe):
    asked = [Request(prompt=text, seed=seed, steps=2, sampler="euler_a", eta=1.0)
             for text, seed in (("a fox", 1), ("a red heart", 9))]  # fmt: skip
    seen = []
    results = pipe.together(asked, on_step=lambda at: seen.append([at.guess(k) for k in range(2)]))
    assert len(seen) == 2
    assert not np.array_equal(seen[1][0], seen[1][1])
    for request, result in zip(asked, results, strict=True):
        alone = pipe(request)
        (picture,) = result.pictures
        assert picture.request == alone.pictures[0].request
        difference = np.asarray(picture.image, int) - np.asarray(alone.image, int)
        assert np.abs(difference).max() <= 2
        assert picture.about == alone.pictures[0].about


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([Request(steps=2), Request(steps=3)], "differ in steps"),
        ([Request(count=2), Request(count=2)], "2 pictures each"),
        ([], "no request"),
        (
            [Request(prompt="fox " * 90, long_prompt=True), Request(long_prompt=True)],
            "tokens cannot run in one batch",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(pipe, requests, says):
    with pytest.raises(RequestError, match=says) as caught:
        pipe.together(requests)
    assert caught.value.hint
