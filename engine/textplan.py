"""What the text tower is given for a prompt: chunks of ids, and how much each token counts.

Plain (both options off) is one chunk, cut where it is full. `weights` reads prompt.py's brackets,
`chunks` goes on in further chunks, each through the tower by itself, their results side by side.

source      stable-diffusion-webui: chunks of 75 tokens, comma backtrack of 20, emphasis "Original"
checked by  tests/unit/test_textplan.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .ports import Array, Floats
from .prompt import BREAK, Span, parse, split_breaks
from .tokenizer import Tokenizer

BACKTRACK = 20  # tokens; a word that does not fit takes its part of the sentence along, from there

Token = tuple[int, float]  # id, weight


@dataclass(frozen=True)
class Plan:
    """n chunks of `length` tokens.

    ids         int64 [n, length]
    weights     float32 [n, length]; 1 for start, end and padding
    dropped     what did not fit, as cleaned text; "" when all of it did
    """

    ids: NDArray[np.int64]
    weights: Floats
    dropped: str = ""

    def __len__(self) -> int:
        return len(self.ids)


def plan(tokenizer: Tokenizer, prompt: str, *, weights: bool = False, chunks: bool = False) -> Plan:
    """Chunks of one prompt; with both options off, Tokenizer.encode's ids as the only one.

    raises      RequestError for text that is not Unicode, and as prompt.parse
    """
    spans = parse(prompt, breaks=chunks) if weights else split_breaks(prompt, chunks)
    if chunks:
        return _framed(tokenizer, _split(_tokens(tokenizer, spans), tokenizer))
    kept: list[Token] = []
    dropped = []
    for span in spans:
        ids, rest = tokenizer.content(span.text, tokenizer.facts.length - 2 - len(kept))
        kept += [(token, span.weight) for token in ids]
        dropped += [rest] if rest else []
    return _framed(tokenizer, [kept], " ".join(dropped))


def level(tokenizer: Tokenizer, plans: Sequence[Plan]) -> list[Plan]:
    """The same plans, each with as many chunks as the longest: empty ones behind its own."""
    most = max(map(len, plans))
    empty = _framed(tokenizer, [[]])
    return [
        Plan(
            np.concatenate([p.ids, *[empty.ids] * (most - len(p))]),
            np.concatenate([p.weights, *[empty.weights] * (most - len(p))]),
            p.dropped,
        )
        for p in plans
    ]


def weigh(hidden: Array, weights: Floats) -> Floats:
    """The tower's results with each token's weight in them, chunks side by side.

    hidden      float32 [n, T, W]
    weights     float32 [n, T]
    returns     float32 [1, n * T, W]; of each chunk the mean over all T * W numbers is kept
    raises      RequestError when the weights leave a chunk no mean to keep
    """
    weighed = hidden * weights[:, :, None]
    before, after = (v.mean(axis=(1, 2), dtype=np.float64) for v in (hidden, weighed))
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(before == after, 1.0, before / after)
    if not np.isfinite(kept).all():
        raise RequestError(
            "the prompt's weights cancel each other: the weighted text has mean 0",
            hint="give weights nearer to 1, such as (word:0.8) or (word:1.3)",
        )
    weighed *= kept[:, None, None].astype(np.float32)
    n, length, width = weighed.shape
    return np.asarray(weighed.reshape(1, n * length, width), np.float32)


def _tokens(tokenizer: Tokenizer, spans: Iterable[Span]) -> Iterable[Token | None]:
    """None is a break."""
    for span in spans:
        if span is BREAK:
            yield None
            continue
        for token in tokenizer.content(span.text)[0]:
            yield token, span.weight


def _split(tokens: Iterable[Token | None], tokenizer: Tokenizer) -> list[list[Token]]:
    """Into chunks: at breaks, and where one is full, or behind a comma shortly before that."""
    room = tokenizer.facts.length - 2
    comma_id = tokenizer.content(",")[0][0]
    done: list[list[Token]] = []
    chunk: list[Token] = []
    comma: int | None = None  # place of the last one in this chunk
    for token in tokens:
        if token is None:
            done.append(chunk)
            chunk, comma = [], None
            continue
        if token[0] == comma_id:
            comma = len(chunk)
        elif len(chunk) == room and comma is not None and room - comma <= BACKTRACK:
            done.append(chunk[: comma + 1])
            chunk, comma = chunk[comma + 1 :], None
        if len(chunk) == room:
            done.append(chunk)
            chunk, comma = [], None
        chunk.append(token)
    return [*done, chunk] if chunk or not done else done


def _framed(tokenizer: Tokenizer, chunks: Sequence[Sequence[Token]], dropped: str = "") -> Plan:
    ids = np.array([tokenizer.framed([token for token, _ in c]) for c in chunks], np.int64)
    weights = np.ones(ids.shape, np.float32)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return Plan(ids, weights, dropped)
