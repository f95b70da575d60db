"""What stands before the page: no path and no address that a request names is opened.

Gradio passes files between browser and server by their paths. Those of our own folder, which it
gave out itself, are taken; every other path, and every address, is refused here, before it sees it.

checked by  tests/http/test_own_files.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine.errors import Forbidden
from .faces import answer, face_of

FILE, PROXY = "/file=", "/proxy="


class OwnFiles:
    """ASGI middleware. The whole body is one message already: `Guard` has counted it.

    home    the only folder whose files may be named
    """

    def __init__(self, app: ASGIApp, home: Path) -> None:
        self._app, self._home = app, home.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        named = [path.partition(FILE)[2]] if FILE in path else []
        if scope["method"] == "POST" and path.startswith("/gradio_api/"):
            message = await receive()
            named += _paths(message.get("body", b""))
            receive = _again(message, receive)
        if PROXY in path or not all(self._ours(name) for name in named):
            told = Forbidden(
                "a request may name the pictures that it sent or was given, and nothing else",
                hint="send the picture itself",
            )
            await answer(face_of(path), told, status=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _ours(self, name: str) -> bool:
        try:
            return Path(name).is_absolute() and Path(name).resolve().is_relative_to(self._home)
        except (OSError, ValueError):  # too long, or with a null character
            return False


def _paths(body: bytes) -> list[str]:
    """What a JSON body names as a path, at any depth; of other bodies nothing."""
    try:
        return list(_found(json.loads(body)))
    except (ValueError, RecursionError):
        return [] if body[:1] not in (b"{", b"[") else [""]


def _found(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield str(one["path"])
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _again(message: MutableMapping[str, Any], receive: Receive) -> Receive:
    given = False

    async def first() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return message

    return first
