"""What keeps the server's own answers quick while pictures are made."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdengine.engine.errors import QueueFull
from sdengine.engine.request import Request
from sdengine.serve.app import create_app
from sdengine.serve.asks import Made
from sdengine.serve.config import Config
from sdengine.serve.encode import encoded
from sdengine.serve.guard import Guard
from sdengine.serve.metrics import Metrics
from sdengine.serve.worker import NICE


def test_engines_yield_the_processor_to_the_server(fake: Any) -> None:
    own = os.getpriority(os.PRIO_PROCESS, fake.process.pid)
    (worker,) = fake.workers()
    assert os.getpriority(os.PRIO_PROCESS, worker) == min(own + NICE, 19)


def test_who_asks_for_health_does_not_wait_for_a_crowd_that_is_refused() -> None:
    def refuse() -> None:
        raise QueueFull("all places are taken", hint="come again", after=1.0)

    async def well(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def main() -> list[int]:
        pool: Any = SimpleNamespace(refuse=refuse, metrics=Metrics())
        guard = Guard(well, Config({"fake": Path("fake")}), pool)
        order: list[int] = []

        async def ask(method: str, path: str) -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": b"{}", "more_body": False}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    order.append(message["status"])

            headers = [(b"host", b"localhost")]
            scope = {"type": "http", "method": method, "path": path, "headers": headers}
            await guard(scope, receive, send)

        crowd = [ask("POST", "/jobs") for _ in range(100)]
        await asyncio.gather(*crowd, ask("GET", "/health/live"))
        return order

    order = asyncio.run(main())
    assert order.count(429) == 100
    assert order.index(200) < 10


def test_what_is_there_at_the_start_is_not_searched_for_garbage(fake_bundle: Path) -> None:
    app = create_app(Config({"fake": fake_bundle}))
    pool = app.state.served.pool
    pool.start = lambda: None

    async def main() -> int:
        async with app.router.lifespan_context(app):
            return gc.get_freeze_count()

    try:
        before = gc.get_freeze_count()
        assert asyncio.run(main()) > before + 10_000
    finally:
        gc.unfreeze()


def test_a_picture_is_packed_quickly() -> None:
    """The second byte of a zlib stream says how hard it was packed: 0x5e is 2 to 5, 0x9c is 6."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    request = Request(prompt="x", steps=1, sampler="euler", guidance=7.0, schedule="linspace")
    data = encoded(Made(64, 64, pixels.tobytes(), request, {}))
    packed = data.index(b"IDAT") + 4
    assert data[packed : packed + 2] == b"\x78\x5e"
