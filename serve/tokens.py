"""Who may ask: a file of tokens, and where a server without one may listen."""

from __future__ import annotations

import logging
from pathlib import Path

from ..engine.errors import RequestError, StorageError
from .guard import loopback

log = logging.getLogger("sdengine.serve")

SHORTEST = 8


def read_tokens(path: Path) -> tuple[str, ...]:
    """One a line, `token` or `user:password`; blank lines and those that begin with # are skipped.

    raises      StorageError; RequestError for a file without a token, or one too short to be one
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"the tokens in {path} cannot be read: {error}",
            hint="name a text file with a token a line",
        ) from None
    lines = [line.strip() for line in text.splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    make = f"head -c 24 /dev/urandom | base64 > {path}; chmod 600 {path}"
    if not tokens:
        raise RequestError(f"{path} holds no token", hint=f"make one: {make}")
    if min(len(token.rpartition(":")[2]) for token in tokens) < SHORTEST:
        raise RequestError(
            f"a token in {path} has fewer than {SHORTEST} characters", hint=f"make one: {make}"
        )
    if path.stat().st_mode & 0o077:
        log.warning("others than you can read %s: chmod 600 %s", path, path)
    return tokens


def check_open(host: str, tokens: tuple[str, ...]) -> None:
    """Raises RequestError where anybody in the network could come in."""
    if not tokens and not loopback(host):
        raise RequestError(
            f"--host {host} is reached from other machines, and there is no token",
            hint="give --token-file FILE, or listen on 127.0.0.1",
        )
