"""Prompt weights as AUTOMATIC1111 writes them: text -> spans with a weight each.

    (word)  times 1.1      (word:1.3)  times 1.3      [word]  divided by 1.1
    brackets nest, and one that is never closed reaches to the end;  \\( \\) \\[ \\] \\\\ are text
    BREAK   begins a new chunk of 75 tokens

What that tool does beyond this (`[from:to:when]`, `[a|b]`) is refused; its `AND` is plain text.

source      stable-diffusion-webui, wiki page "Features", Attention/emphasis and BREAK keyword
checked by  tests/unit/test_prompt.py (the examples of its own documentation)
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from .errors import RequestError

STRONGER, WEAKER = 1.1, 1 / 1.1


class Span(NamedTuple):
    """Text, and how much more than usual it counts."""

    text: str
    weight: float


BREAK = Span("BREAK", 0.0)  # known by identity

_TOKEN = re.compile(
    r"""\\[()\[\]\\]        # an escaped character
    | \\                    # a lone backslash vanishes
    | [(\[]
    | :\s*([+-]?[.\d]+)\s*\)  # a closing bracket with a weight
    | [)\]]
    | [^\\()\[\]:]+
    | :""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*(?::\s*[.\d]+\s*|\|[^\[\]]*)\]")


def parse(text: str, *, breaks: bool = True) -> list[Span]:
    """Spans in order, neighbours of one weight joined; BREAK stands between the chunks it parts.

    breaks      whether the word BREAK is one; else it is text
    raises      RequestError for a weight that is no finite number, and for prompt editing
    """
    if found := _EDITING.search(text):
        raise RequestError(
            f"the prompt holds {found[0]!r}, which would change with the steps; that is not done"
            " here",
            hint=r"write \[ and \] for brackets that are text, or take these out",
        )
    spans: list[Span] = []
    open_brackets: dict[str, list[int]] = {"(": [], "[": []}  # where in `spans` each began
    for match in _TOKEN.finditer(text):
        token, weight = match[0], match[1]
        if token in open_brackets:
            open_brackets[token].append(len(spans))
        elif weight is not None and open_brackets["("]:
            _scale(spans, open_brackets["("].pop(), _number(weight, token))
        elif token == ")" and open_brackets["("]:
            _scale(spans, open_brackets["("].pop(), STRONGER)
        elif token == "]" and open_brackets["["]:
            _scale(spans, open_brackets["["].pop(), WEAKER)
        elif token[0] == "\\":
            spans.append(Span(token[1:], 1.0))
        else:
            spans += split_breaks(token, breaks)
    for bracket, factor in (("(", STRONGER), ("[", WEAKER)):
        for begin in open_brackets[bracket]:
            _scale(spans, begin, factor)
    return _joined(spans)


def split_breaks(text: str, breaks: bool) -> list[Span]:
    """Text without weights, parted where it says BREAK."""
    parts = _BREAK.split(text) if breaks else [text]
    return [s for part in parts for s in (BREAK, Span(part, 1.0))][1:]


def _scale(spans: list[Span], begin: int, factor: float) -> None:
    spans[begin:] = [s if s is BREAK else Span(s.text, s.weight * factor) for s in spans[begin:]]


def _number(text: str, token: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(
            f"the prompt holds {token!r}: {text!r} is no weight",
            hint=r"write a weight as (word:1.3); write \( and \) for brackets that are text",
        )
    return value


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if not math.isfinite(span.weight):
            raise RequestError(
                f"the brackets around {span.text[:40]!r} multiply to no finite weight",
                hint="nest fewer brackets, or give one weight as (word:1.3)",
            )
        last = joined[-1] if joined else BREAK
        apart = span is BREAK or last is BREAK
        if not apart and span.weight == last.weight:
            joined[-1] = Span(last.text + span.text, span.weight)
        else:
            joined.append(span)
    return joined if joined else [Span("", 1.0)]
