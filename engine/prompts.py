"""A file of prompts, one a line, and the requests that it makes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import RequestError, StorageError
from .request import SEED_END, Request


def read(path: Path) -> list[str]:
    """The prompts of a UTF-8 file: one a line, blank lines skipped, spaces at the ends too.

    A blank line is no picture here; the reference draws one of the empty prompt (reference-spec 8).

    raises      StorageError; RequestError for a file that is not text, or holds no prompt
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check the path and that you may read the file",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            hint="save it as UTF-8, one prompt a line",
        ) from None
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise RequestError(f"{path} holds no prompt", hint="write one prompt a line")
    return found


def each(request: Request, prompts: Sequence[str]) -> list[Request]:
    """One request a prompt, `count` pictures each. Seeds (with a variation, its seeds) count up
    through all of them, so no two pictures share their noise, and each is the one that its own
    seed makes alone.

    raises      RequestError where the seeds reach past their end
    """
    total = request.count * len(prompts)
    if request.seed is None:
        request = replace(request, seed=secrets.randbelow(SEED_END - total))
    name = "seed" if request.variation_seed is None else "variation_seed"
    first = getattr(request, name)
    if first + total > SEED_END:
        raise RequestError(
            f"{name} {first} and {total} pictures of {len(prompts)} prompts reach past"
            f" {SEED_END - 1}",
            hint=f"take at most {SEED_END - total}, or fewer pictures",
        )
    return [
        replace(request, prompt=prompt, **{name: first + k * request.count})
        for k, prompt in enumerate(prompts)
    ]
