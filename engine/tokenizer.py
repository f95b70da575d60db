"""Text to token ids: OpenCLIP's cleaning and byte-pair encoding, from the bundle's own file.

The encoder is written out here, not taken from a library: a merge's place in the file is its id, so
nothing but one dictionary has to be built, and that takes a tenth of the time that the `tokenizers`
library needs to be imported and to build its model.

source      reference-spec 1.8: open_clip 2.0.2 `SimpleTokenizer`
checked by  tests/unit/test_tokenizer.py (recorded ids; open_clip itself on random text)
"""

from __future__ import annotations

import gzip
import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice
from pathlib import Path

from .bundle import TokenizerFacts
from .errors import CorruptPart, MissingPart, RequestError

START_TEXT, END_TEXT = "<start_of_text>", "<end_of_text>"

# Half of a surrogate pair: what Python makes of bytes that are not UTF-8 (on a command line).
LONE_SURROGATE = re.compile(
    r"[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]"
)

# Text that ftfy and html.unescape return as it is, but for line ends, which become spaces anyway.
# ftfy takes longer to import than all the rest here together, and most prompts do not need it.
PLAIN = re.compile(r"[\t\n\r -%'-~]*")

# `[^\W\d_]+` is letters and numbers that are not decimal digits (½, Ⅷ): `_words` takes these apart.
# Ignoring case matters even after lower(): `ſ` (long s) is its own lower case and matches `s`, and
# to the reference's regular expressions U+0345 is neither a letter nor anything else: it vanishes.
WORD = re.compile(
    rf"(?i:{START_TEXT}|{END_TEXT}|'s|'t|'re|'ve|'m|'ll|'d)|[^\W\d_]+|\d|(?:[^\s\w\u0345]|_)+"
)
SUBWORD = re.compile(r"[^\W\d_]+")

BYTES = 256  # ids 0..255 are bytes, 256..511 bytes that end a word, then one id per merge
END_OF_WORD = "</w>"


@dataclass(frozen=True)
class Encoded:
    """A prompt as the text tower takes it.

    ids       `length` ids: start, content, end, padding
    dropped   what did not fit, as cleaned text (lower case); "" when all of it did
    """

    ids: tuple[int, ...]
    dropped: str


class Tokenizer:
    """`file` holds the merges (gzip, one header line); `facts` the special ids and the length.

    raises   MissingPart, CorruptPart when the file cannot serve
    """

    def __init__(self, file: Path, facts: TokenizerFacts) -> None:
        self._facts = facts
        self._special = {START_TEXT: facts.start, END_TEXT: facts.end}
        # The specials follow the last merge in the vocabulary, so the start id counts the merges.
        self._ranks = _read_merges(file, facts.start - 2 * BYTES)

    @property
    def facts(self) -> TokenizerFacts:
        return self._facts

    def encode(self, text: str) -> Encoded:
        """Ids of one prompt; "" is legal. Raises RequestError for text that is not Unicode."""
        content, dropped = self.content(text, self._facts.length - 2)
        return Encoded(self.framed(content), dropped)

    def content(self, text: str, room: int | None = None) -> tuple[list[int], str]:
        """Ids of a text alone, at most `room` of them, and the cleaned text that did not fit."""
        cleaned = clean(text)
        content: list[int] = []
        for word, at in _words(cleaned):
            pieces = self._pieces(word)
            fits = len(pieces) if room is None else room - len(content)
            content += [piece for piece, _ in pieces[:fits]]
            if len(pieces) > fits:
                kept_bytes = sum(size for _, size in pieces[:fits])
                # A character whose bytes are torn apart by the cut counts as dropped.
                kept = len(word.encode()[:kept_bytes].decode("utf-8", "ignore"))
                return content, cleaned[at + kept :]
        return content, ""

    def framed(self, content: Sequence[int]) -> tuple[int, ...]:
        """`length` ids: start, content, end, padding."""
        ids = [self._facts.start, *content, self._facts.end]
        return (*ids, *[self._facts.pad] * (self._facts.length - len(ids)))

    def _pieces(self, word: str) -> list[tuple[int, int]]:
        """(id, bytes of text) of each piece of one word."""
        if word in self._special:
            return [(self._special[word], len(word))]
        raw = word.encode()
        # Each piece is known by its first byte's place; `after` and `before` link the living ones.
        n = len(raw)
        symbols = [BYTE_SYMBOLS[b] for b in raw]
        ids = [BYTE_IDS[b] for b in raw]
        symbols[-1] += END_OF_WORD
        ids[-1] += BYTES
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        ranks = self._ranks

        def rank(i: int) -> int | None:
            j = after[i]
            return ranks.get(f"{symbols[i]} {symbols[j]}") if j < n else None

        # Lowest rank first, then leftmost. The reference merges all places of one pair in a sweep;
        # that is the same, for a pair that a merge creates always ranks behind that merge.
        queue = [(r, i) for i in range(n) if (r := rank(i)) is not None]
        heapify(queue)
        while queue:
            merge, i = heappop(queue)
            if not symbols[i] or rank(i) != merge:
                continue  # one of the two has been merged with something else since
            j = after[i]
            symbols[i] += symbols[j]
            symbols[j] = ""
            ids[i] = 2 * BYTES + merge
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            for k in (before[i], i):
                if k >= 0 and (r := rank(k)) is not None:
                    heappush(queue, (r, k))
        return [(ids[i], after[i] - i) for i in range(n) if symbols[i]]


def clean(text: str) -> str:
    """Mended Unicode, HTML entities resolved, single spaces, lower case.

    raises   RequestError when `text` holds half of a surrogate pair (bytes that were not UTF-8)
    """
    if bad := LONE_SURROGATE.search(text):
        raise RequestError(
            f"the prompt is not valid Unicode: found U+{ord(bad[0]):04X}, half of a character, "
            f"at position {bad.start()}; expected text in UTF-8",
            hint="give the prompt as UTF-8 (on a terminal: check that `locale` says UTF-8)",
        )
    if not PLAIN.fullmatch(text):
        from ftfy import fix_text  # here, because most prompts never need it: see PLAIN

        text = html.unescape(html.unescape(fix_text(text)))
    return " ".join(text.split()).lower()


def _words(cleaned: str) -> list[tuple[str, int]]:
    """The words of cleaned text with their positions: letters, one digit, or anything else."""
    words = []
    for match in WORD.finditer(cleaned):
        word, at = match[0], match.start()
        if not SUBWORD.fullmatch(word) or word.isalpha():
            words.append((word, at))
            continue
        begin = 0
        for i, character in enumerate(word):
            if character.isalpha():
                continue
            if i > begin:
                words.append((word[begin:i], at + begin))
            words.append((character, at + i))
            begin = i + 1
        if begin < len(word):
            words.append((word[begin:], at + begin))
    return words


def _byte_symbols() -> list[str]:
    """A printable character for each byte; the others are moved to U+0100 and up, in order."""
    moved = iter(range(256, 512))
    return [chr(b) if _printable(b) else chr(next(moved)) for b in range(BYTES)]


def _printable(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE


BYTE_SYMBOLS = _byte_symbols()
# The vocabulary begins with the printable bytes, then the moved ones: byte -> id.
BYTE_IDS = {
    b: i for i, b in enumerate(sorted(range(BYTES), key=lambda byte: (not _printable(byte), byte)))
}


def _read_merges(file: Path, count: int) -> dict[str, int]:
    """`left right` -> rank, for the first `count` merges; the file goes on far behind them."""
    hint = "export the model again, or copy the tokenizer folder of an intact bundle"
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as stream:
            merges = [line.removesuffix("\n") for line in islice(stream, 1, count + 1)]
    except FileNotFoundError:
        raise MissingPart(f"the tokenizer's file is not there: {file}", hint=hint) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorruptPart(
            f"the tokenizer's file cannot be read: {file}: {error}; expected gzip text", hint=hint
        ) from None
    good = sum(merge.count(" ") == 1 for merge in merges)
    if good != count:
        raise CorruptPart(
            f"the tokenizer's file holds {good} merges, expected {count}: {file}", hint=hint
        )
    return dict(zip(merges, range(count), strict=True))
