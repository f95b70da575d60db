"""The text half: one call for both prompts, kept by the tokens of that call."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.engine import texts
from sdengine.engine.bundle import open_bundle
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.request import Request
from sdengine.engine.texts import Texts


class Encoder:
    """Sessions of a text encoder that counts, and answers with its tokens and its call."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.opened = 0

    def __call__(self, component, dims):
        assert component == "text_encoder"
        self.opened += 1
        return self.run

    def run(self, feeds):
        ids = feeds["input_ids"]
        self.calls.append(len(ids))
        hidden = np.repeat(ids[:, :, None].astype(np.float32), 4, axis=2)
        return {"last_hidden_state": hidden + len(self.calls) / 8}


@pytest.fixture
def both():
    bundle = open_bundle(api.EMBEDDED["emoji"])
    return Texts(bundle), Encoder()


def encode(both, prompt, negative="", guided=True):
    made, encoder = both
    request = Request(prompt=prompt, negative_prompt=negative)
    return made.encode(encoder, made.plans(request.completed("txt2img", (64, 64)), guided, []))


def test_both_prompts_in_one_call(both):
    uncond, cond = encode(both, "a fox", "a dog")
    assert both[1].calls == [2]
    assert uncond.shape == cond.shape == (1, 77, 4)
    alone, text = encode(both, "a fox", guided=False)
    assert alone is None
    assert both[1].calls == [2, 1]
    np.testing.assert_array_equal(text - 2 / 8, cond - 1 / 8)


def test_what_was_encoded_is_not_encoded_again(both):
    first = encode(both, "a fox", "a dog")
    again = encode(both, "A  FOX", "a dog")  # the same tokens
    assert (both[1].calls, both[1].opened) == ([2], 1)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_neighbour_is_another_call(both):
    """The prompt's own row could come out differently by a bit beside another one."""
    encode(both, "a fox", "a dog")
    encode(both, "a fox", "a cat")
    encode(both, "a dog", "a fox")
    assert both[1].calls == [2, 2, 2]


def test_a_caller_cannot_spoil_what_is_kept(both):
    _, cond = encode(both, "a fox")
    wanted = cond.copy()
    cond[...] = 7
    np.testing.assert_array_equal(encode(both, "a fox")[1], wanted)


def test_the_last_ones_are_kept(both):
    for n in range(texts.KEPT + 1):
        encode(both, f"picture {n}")
    encode(both, f"picture {texts.KEPT}")
    encode(both, "picture 1")
    assert len(both[1].calls) == texts.KEPT + 1
    encode(both, "picture 0")
    assert len(both[1].calls) == texts.KEPT + 2


def test_a_second_run_of_a_pipeline_opens_no_text_encoder():
    bundle = open_bundle(api.EMBEDDED["emoji"])
    opened = []

    class Noted(api.EngineSessions):
        def __call__(self, component, dims, **how):
            opened.append(component)
            return super().__call__(component, dims, **how)

    with Pipeline(bundle, Noted(bundle, Fake(prediction="v"), "f32", None), {}) as pipe:
        one, two = (pipe(prompt="a fox", steps=1, seed=1) for _ in range(2))
    assert opened.count("text_encoder") == 1
    np.testing.assert_array_equal(one.pictures[0].latent, two.pictures[0].latent)
