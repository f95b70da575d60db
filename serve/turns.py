"""Requests that come by the hundred take turns, a few each time round the event loop.

Without, the loop runs all of them before it looks at its sockets again, and whoever asks for
health, progress or a cancel in that moment waits for all of them.

    await turns.take()      returns at once while nobody waits; in order of arrival

checked by  tests/http/test_turns.py
"""

from __future__ import annotations

import asyncio
from collections import deque

EACH = 4  # turns a round: of requests that are refused half a millisecond, of others a few


class Turns:
    def __init__(self, each: int = EACH) -> None:
        self._each = self._left = each
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False  # whether the next round is on its way

    async def take(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._round)
        if self._left > 0:  # then nobody waits
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _round(self) -> None:
        self._left = self._each
        while self._waiting and self._left > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # its client has gone
                turn.set_result(None)
                self._left -= 1
        self._counting = self._left < self._each
        if self._counting:
            asyncio.get_running_loop().call_soon(self._round)
