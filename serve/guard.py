"""The door: who may come in, and with how much. Nothing behind it is reached without.

A page of another site must not drive a server on the reader's own machine: a request that names an
origin must name ours, and without a token the host asked for must be this machine by name.

checked by  tests/http/test_guard.py
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from ..engine.errors import Forbidden, RequestError, SdengineError, TooLarge
from .config import Config
from .faces import answer, face_of
from .pool import Pool
from .turns import Turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health/live", "/health/ready")
# Pictures that were answered as addresses, under names that nobody can guess: who is to show one
# has no token.
NAMED = "/v1/images/files/"
# where pictures are made: with a full queue these are refused before anything is parsed
MAKING = (
    "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations", "/v1/images/edits",
    "/v1/images/variations", "/jobs",
)  # fmt: skip
BODY_S = 60.0  # in which a body must have come


def loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    def __init__(self, app: App, config: Config, pool: Pool) -> None:
        self._app, self._config, self._pool = app, config, pool
        self._known = [_digest(token.encode()) for token in config.tokens]
        self._local = loopback(config.host)
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])  # in lower case, as ASGI has them
        if scope["type"] == "websocket":
            try:
                self._check(scope, headers)
            except (SdengineError, _Foreign):
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        begun, face = perf_counter(), face_of(scope["path"])

        async def timed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                took = f"{perf_counter() - begun:.4f}".encode()
                message["headers"] = [
                    *message.get("headers", []), (b"x-process-time", took),
                    (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
            if scope["method"] == "POST" and scope["path"] in MAKING:
                await self._turns.take()
                self._pool.refuse()
        except _Foreign as error:
            self._pool.metrics.refused.labels("origin").inc()
            await answer(face, error.why, status=403)(scope, receive, timed)
        except _Gone:
            return
        except SdengineError as error:
            self._pool.metrics.refused.labels(type(error).__name__).inc()
            await answer(face, error)(scope, receive, timed)
        else:
            await self._app(scope, _replay(body, receive), timed)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises Forbidden, _Foreign."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not _same(origin, host):
            raise _Foreign(f"a page of {origin[:80]} may not use this server")
        if self._known:
            path = scope["path"]
            opened = path in OPEN or path.startswith(NAMED)
            if not opened and not self._token_known(headers):
                raise Forbidden(
                    "no token, or one that is not known here",
                    hint="send Authorization: Bearer TOKEN, or HTTP basic auth with it as password",
                )
        elif self._local and not _names_this_machine(host):
            raise _Foreign(f"this server does not answer to the name {host[:80]!r}")

    def _token_known(self, headers: dict[bytes, bytes]) -> bool:
        """`token` fits as bearer, or as the password of any user; `user:password` as basic auth."""
        kind, _, value = headers.get(b"authorization", b"").partition(b" ")
        offered = [value.strip()]
        if kind.lower() == b"basic":
            try:
                pair = base64.b64decode(value, validate=True)
            except binascii.Error:
                return False
            offered = [pair, pair.partition(b":")[2]]
        elif kind.lower() != b"bearer":
            return False
        digests = [_digest(each) for each in offered]
        return any([hmac.compare_digest(a, b) for a in digests for b in self._known])

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """All of it. Raises TooLarge, RequestError, _Gone."""
        most = self._config.limits.body
        declared = headers.get(b"content-length", b"0")
        too_large = TooLarge(
            f"the request has more than {most:,} bytes", hint="send smaller or fewer pictures"
        )
        if not declared.isdigit() or int(declared) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestError(
                f"the request's body did not come within {BODY_S:g} s", hint="send it faster"
            ) from None


class _Foreign(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.why = Forbidden(
            message, hint="ask from the machine itself as 127.0.0.1, or start it with --token-file"
        )


class _Gone(Exception):
    """The client went before all of its request was here."""


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


@lru_cache(maxsize=64)  # a flood of requests names it alike
def _names_this_machine(host: str) -> bool:
    try:
        found = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return found is not None and loopback(found)


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what comes after it: that the client has gone."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
