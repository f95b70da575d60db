"""Prompt weights, against the examples in AUTOMATIC1111's own documentation."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdengine.engine.errors import RequestError
from sdengine.engine.prompt import BREAK, Span, parse


@pytest.mark.parametrize(
    ("text", "spans"),
    [  # docstring of stable-diffusion-webui's parse_prompt_attention
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # its wiki, page Features, "Attention/emphasis": three ways to say nearly the same, and more
        ("a (word)", [("a ", 1.0), ("word", 1.1)]),
        ("a ((word))", [("a ", 1.0), ("word", 1.21)]),
        ("a [word]", [("a ", 1.0), ("word", 1 / 1.1)]),
        ("a (word:1.5)", [("a ", 1.0), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1.0), ("word", 0.25)]),
        (r"a \(word\)", [("a (word)", 1.0)]),
    ],
)
def test_documented_examples(text, spans):
    got = parse(text)
    assert [s.text for s in got] == [text for text, _ in spans]
    assert [s.weight for s in got] == pytest.approx([weight for _, weight in spans], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("a:b, 3:4", [("a:b, 3:4", 1.0)]),
        ("a) b] :1.3)", [("a) b] :1.3)", 1.0)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:+.5)", [("a", 0.5)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:2)(b:2)", [("ab", 2.0)]),
        (r"(\(a\):2)", [("(a)", 2.0)]),
        (r"a\\b \c", [(r"a\b c", 1.0)]),
        ("[(a:2", [("a:2", 1.0)]),
        ("(a [b", [("a ", 1.1), ("b", 1.0)]),
    ],
)
def test_corners(text, spans):
    got = parse(text)
    assert [s.text for s in got] == [text for text, _ in spans]
    assert [s.weight for s in got] == pytest.approx([weight for _, weight in spans], rel=1e-12)


def test_breaks():
    assert parse("a BREAK  b") == [Span("a", 1.0), BREAK, Span("b", 1.0)]
    assert parse("(a BREAK b)[BREAK]")[1] is BREAK
    assert sum(s is BREAK for s in parse("(a BREAK b:2)[BREAK]")) == 2
    assert [s.weight for s in parse("(a BREAK b:2)") if s is not BREAK] == [2.0, 2.0]
    for text in ("BREAKFAST", "a break", "aBREAK"):
        assert parse(text) == [Span(text, 1.0)]
    assert parse("a BREAK (b)", breaks=False) == [Span("a BREAK ", 1.0), Span("b", 1.1)]


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


TEXT = st.text(st.sampled_from("ab ,:.()[]\\12é\n"), max_size=12)
WEIGHTS = st.sampled_from([0.0, 0.25, 0.5, 1.3, 2.0, -1.0])


@given(TEXT)
def test_escaped_text_is_plain(text):
    assert parse(escaped(text)) == [Span(text, 1.0)]


@given(st.lists(st.tuples(TEXT, WEIGHTS), min_size=1, max_size=6))
def test_weights_round_trip(spans):
    """Written out one bracket each, they come back, neighbours of one weight joined."""
    text = "".join(f"({escaped(t)}:{w})" for t, w in spans)
    want: list[list] = []
    for t, w in spans:
        if not t:
            continue
        if want and want[-1][1] == w:
            want[-1][0] += t
        else:
            want.append([t, w])
    got = [[s.text, s.weight] for s in parse(text) if s.text]
    assert got == want


@given(st.integers(0, 30), st.integers(0, 30))
def test_nesting_multiplies(stronger, weaker):
    text = "(" * stronger + "[" * weaker + "x" + "]" * weaker + ")" * stronger
    (span,) = (s for s in parse(text) if s.text)
    assert span.weight == pytest.approx(1.1 ** (stronger - weaker), rel=1e-9)


@given(st.text(st.sampled_from("ab :()[]\\1.BREAK"), max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        spans = parse(text)
    except RequestError:
        return
    assert spans
    kept = "".join(s.text for s in spans if s is not BREAK)
    assert set(kept) <= set(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(a:1.2.3)", "'1.2.3' is no weight"),
        ("(a:.)", "'.' is no weight"),
        (f"(a:{'9' * 400})", "is no weight"),
        ("(" * 8000 + "x", "multiply to no finite weight"),
        ("a [cat:dog:0.5]", r"holds '\[cat:dog:0.5\]', which would change with the steps"),
        ("[cat:10]", "would change with the steps"),
        ("[cat|dog]", "would change with the steps"),
    ],
)
def test_refused(text, said):
    with pytest.raises(RequestError, match=said) as caught:
        parse(text)
    assert re.search(r"brackets", caught.value.hint)


def test_escaped_editing_is_text():
    assert parse(r"\[cat|dog\]") == [Span("[cat|dog]", 1.0)]
