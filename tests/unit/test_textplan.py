"""Chunks and weights: which token goes where, and what the weights do to the tower's results."""

from __future__ import annotations

import importlib.util
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine.engine.bundle import TokenizerFacts
from sdengine.engine.errors import RequestError
from sdengine.engine.textplan import level, plan, weigh
from sdengine.engine.tokenizer import Tokenizer

FACTS = TokenizerFacts(start=49406, end=49407, pad=0, length=77)
NAME = "bpe_simple_vocab_16e6.txt.gz"
EMBEDDED = Path(__file__).parents[2] / "models" / "emoji" / "tokenizer" / NAME
CAT, DOG, COMMA = 2368, 1929, 267  # ids of CLIP's vocabulary: reference-spec 1.8, vocab.json


def vocabulary() -> Path | None:
    if EMBEDDED.is_file():
        return EMBEDDED
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent / NAME if spec and spec.origin else None


pytestmark = pytest.mark.skipif(vocabulary() is None, reason="no vocabulary file here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(vocabulary(), FACTS)


def row(*content: int) -> list[int]:
    return [49406, *content, 49407, *[0] * (75 - len(content))]


def content(made) -> list[list[int]]:
    """Ids between start and end of each chunk."""
    return [ids[1 : ids.index(49407)] for ids in made.ids.tolist()]


BOTH = {"weights": True, "chunks": True}


def test_off_is_plain_text(tokenizer, golden):
    """The reference's own ids, brackets and BREAK included as they stand."""
    for item in golden("tokenizer")[0]["items"]:
        made = plan(tokenizer, item["prompt"])
        assert made.ids.tolist() == [item["ids"]]
        assert (made.weights == 1).all()
        assert bool(made.dropped) == item["truncated"]
        assert made.dropped == tokenizer.encode(item["prompt"]).dropped


@pytest.mark.parametrize("options", [{}, {"chunks": True}, {"weights": True}, BOTH])
@pytest.mark.parametrize("text", ["", "a photo of a cat", "cat, dog", "Hello, World!", "2023"])
def test_short_plain_text_is_the_same_in_every_mode(tokenizer, text, options):
    made = plan(tokenizer, text, **options)
    assert made.ids.tolist() == [list(tokenizer.encode(text).ids)]
    assert made.ids.dtype == np.int64
    np.testing.assert_array_equal(made.weights, np.ones((1, 77), np.float32))
    assert made.dropped == ""


def test_weights_stand_at_their_tokens(tokenizer):
    made = plan(tokenizer, "cat (dog, dog:1.5) [cat]", weights=True)
    assert made.ids.tolist() == [row(CAT, DOG, COMMA, DOG, CAT)]
    want = np.ones((1, 77))
    want[0, 2:5], want[0, 5] = 1.5, 1 / 1.1
    np.testing.assert_allclose(made.weights, want, rtol=1e-6)
    assert made.weights.dtype == np.float32


def test_a_weighted_prompt_without_chunks_is_cut_and_says_what(tokenizer):
    made = plan(tokenizer, "cat " * 74 + "(dog Zebra, tail:1.5) and [end]", weights=True)
    assert made.ids.tolist() == [row(*[CAT] * 74, DOG)]
    assert made.weights[0, 75] == 1.5
    assert made.dropped == "zebra, tail and end"
    assert "break" in plan(tokenizer, "cat " * 80 + "BREAK", weights=True).dropped


def test_further_chunks_without_weights(tokenizer):
    """Without weights brackets are text; BREAK parts all the same."""
    made = plan(tokenizer, "cat " * 76 + "BREAK (dog)", chunks=True)
    left, right = tokenizer.content("(")[0] + [DOG], tokenizer.content(")")[0]
    assert content(made) == [[CAT] * 75, [CAT], [*left, *right]]
    assert made.dropped == ""


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [  # words before one comma and after it -> tokens in each chunk
        (74, 0, [75]),
        (74, 1, [75, 1]),
        (75, 1, [75, 2]),  # the comma itself does not fit
        (60, 14, [75]),
        (60, 15, [61, 15]),
        (60, 80, [61, 75, 5]),
        (55, 20, [56, 20]),  # 20 tokens from the end: the last place that is looked back to
        (54, 21, [75, 1]),
    ],
)
def test_a_comma_near_the_end_takes_what_follows_along(tokenizer, before, after, sizes):
    made = plan(tokenizer, "cat " * before + "," + " dog" * after, **BOTH)
    assert [len(c) for c in content(made)] == sizes
    assert [*chain(*content(made))] == [CAT] * before + [COMMA] + [DOG] * after


def test_weights_move_with_their_tokens(tokenizer):
    made = plan(tokenizer, "cat " * 60 + ", (" + "dog " * 15 + ":1.5)", **BOTH)
    np.testing.assert_array_equal(made.weights[0], np.ones(77))
    assert made.weights[1].tolist() == [1.0, *[1.5] * 15, *[1.0] * 61]


def test_breaks(tokenizer):
    assert content(plan(tokenizer, "cat BREAK dog", **BOTH)) == [[CAT], [DOG]]
    assert content(plan(tokenizer, "BREAK cat BREAK BREAK dog BREAK", **BOTH)) == [
        [], [CAT], [], [DOG],
    ]  # fmt: skip
    made = plan(tokenizer, "(cat BREAK dog:2)", **BOTH)
    assert made.ids.tolist() == [row(CAT), row(DOG)]
    assert made.weights[:, 1].tolist() == [2.0, 2.0]


def test_shorter_prompts_get_empty_chunks(tokenizer):
    long = plan(tokenizer, "cat " * 160, **BOTH)
    short = plan(tokenizer, "(dog:1.5)", **BOTH)
    first, second = level(tokenizer, [short, long])
    assert first.ids.tolist() == [row(DOG), row(), row()]
    assert first.weights[:, 1].tolist() == [1.5, 1.0, 1.0]
    np.testing.assert_array_equal(second.ids, long.ids)
    assert len(first) == len(second) == 3


WORDS = st.sampled_from(["cat", "dog", ",", "a", "2023", "!", "unbelievably", "é", "BREAK"])


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=230))
def test_no_token_is_lost(tokenizer, words):
    text = " ".join(words)
    made = plan(tokenizer, text, **BOTH)
    parts = [" ".join(" ".join(words).split()) for words in _parts(words)]
    want = [token for part in parts for token in tokenizer.content(part)[0]]
    got = content(made)
    assert [*chain(*got)] == want
    assert all(len(chunk) <= 75 for chunk in got)
    for ids, chunk in zip(made.ids.tolist(), got, strict=True):
        assert ids == row(*chunk)


def _parts(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "BREAK":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


# What the weights do


def test_weigh_keeps_each_chunks_mean():
    """Closed form: token times weight, then each chunk times (mean before / mean after)."""
    rng = np.random.default_rng(1)
    hidden = (rng.standard_normal((2, 77, 16)) + 0.3).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, (2, 77)).astype(np.float32)
    got = weigh(hidden, weights)
    assert (got.shape, got.dtype) == ((1, 154, 16), np.float32)
    for chunk, h, w in zip(got.reshape(2, 77, 16), hidden, weights, strict=True):
        assert chunk.mean(dtype=np.float64) == pytest.approx(h.mean(dtype=np.float64), rel=1e-5)
        ratio = chunk / (h * w[:, None])
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_weights_of_one_change_no_bit():
    hidden = np.random.default_rng(1).standard_normal((3, 77, 8)).astype(np.float32)
    got = weigh(hidden, np.ones((3, 77), np.float32))
    np.testing.assert_array_equal(got[0], np.concatenate(hidden))


def test_weights_that_cancel():
    hidden = np.ones((1, 4, 2), np.float32)
    with pytest.raises(RequestError, match="cancel each other") as caught:
        weigh(hidden, np.array([[1, 1, -1, -1]], np.float32))
    assert "nearer to 1" in caught.value.hint


@pytest.mark.export
def test_the_network_takes_two_chunks(golden):
    """T = 154 through the reference-proved UNet: each token counts, and order of tokens does not
    (attention over keys), so twice the same chunk is the single one."""
    torch = pytest.importorskip("torch")
    from sdengine.export.modules import unet

    case, arrays = golden("unet_base")
    network = unet.UNet(unet.UNetConfig.from_ldm(case["config"]["unet"])).eval()
    prefix = len(unet.PREFIX)
    network.load_state_dict(
        {k[prefix:]: torch.from_numpy(v).float() for k, v in arrays.items()
         if k.startswith(unet.PREFIX)}
    )  # fmt: skip
    x, t, context = (torch.from_numpy(arrays[f"in.{k}"]) for k in ("x", "t", "context"))
    other = torch.flip(context, [0])
    with torch.inference_mode():
        twice = network(x, t, torch.cat([context, context], 1)).numpy()
        both, turned = (
            network(x, t, torch.cat(pair, 1)).numpy()
            for pair in ((context, other), (other, context))
        )
    np.testing.assert_allclose(twice, arrays["out.eps"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(both, turned, rtol=0, atol=1e-4)
    assert np.abs(both - twice).max() > 1e-2
