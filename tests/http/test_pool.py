"""The queue and a worker that misbehaves. No server and no engine are needed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from sdengine import api
from sdengine.engine.errors import NoWorker, SdengineError, WorkerLost
from sdengine.engine.request import Request
from sdengine.serve import pool as pools
from sdengine.serve.asks import Ask, Pictures
from sdengine.serve.child import Child
from sdengine.serve.config import Config
from sdengine.serve.faces import answer
from sdengine.serve.wire import Message

CONFIG = Config({"emoji": api.EMBEDDED["emoji"]}, batch=2, open_s=0.3)
DONE = {"slot": 0, "seconds": 0.1, "timings": {}, "warnings": [], "rss": 1}


def made(request: dict[str, Any]) -> Message:
    fields = {"slot": 0, "width": 1, "height": 1, "request": request, "about": {}}
    return Message("made", fields, (b"rgb",))


class Stub:
    """A worker that misbehaves at its first run, as `fault` says, and then no more."""

    fault: Any = None

    def __init__(self, config: Config) -> None:
        self.batch_pays = self.crowded = False
        self.rss, self.running = 0, None

    async def start(self) -> None:
        if isinstance(self.fault, WorkerLost):
            raise self.fault

    async def end(self) -> None:
        pass

    async def died(self) -> None:
        await asyncio.Event().wait()

    async def run(self, model, requests, about, blobs):
        fault, Stub.fault = Stub.fault, None
        if fault == "assert":
            raise AssertionError("a frame of our own is too big")
        yield made(requests[0])
        if fault == "die":
            raise WorkerLost("its process has died", hint="none")
        yield Message("done", DONE)


@pytest.fixture
def with_pool(monkeypatch):
    def run(fault: Any, use: Any) -> Any:
        async def whole() -> Any:
            pool = pools.Pool(CONFIG)
            pool.start()
            try:
                async with asyncio.timeout(10):
                    return await use(pool)
            finally:
                await pool.close(0)

        monkeypatch.setattr(Stub, "fault", fault)
        monkeypatch.setattr(pools, "Child", Stub)
        monkeypatch.setattr(pools, "PATIENCE", (0.0,))
        return asyncio.run(whole())

    return run


def test_an_unexpected_error_ends_its_job_and_no_other(with_pool):
    async def use(pool: Any) -> None:
        with pytest.raises(SdengineError, match="unexpected AssertionError") as caught:
            await pool.submit(Ask("emoji", Request())).result()
        assert "report this" in caught.value.hint
        assert len(await pool.submit(Ask("emoji", Request())).result()) == 1
        assert pool.restarts == 1

    with_pool("assert", use)


def test_what_cannot_be_compared_does_not_wait(with_pool):
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    request = Request(seed=1)
    object.__setattr__(request, "tile", deep)

    async def use(pool: Any) -> None:
        with pytest.raises(TypeError, match="unhashable"):
            pool.submit(Ask("emoji", request))
        assert not pool.waiting
        assert len(await pool.submit(Ask("emoji", Request())).result()) == 1

    with_pool(None, use)


def test_a_picture_of_a_part_that_runs_again_is_there_once(with_pool):
    async def use(pool: Any) -> None:
        job = pool.submit(Ask("emoji", Request()))
        assert len(await job.result()) == 1
        assert job.attempts == 2

    with_pool("die", use)


def test_a_kept_job_lets_its_uploads_go(with_pool):
    async def use(pool: Any) -> None:
        job = pool.submit(Ask("emoji", Request(), Pictures((b"much",))), keep=True)
        await job.result()
        assert not pool.find(job.id).ask.pictures

    with_pool(None, use)


def test_no_worker_at_all_is_told(with_pool):
    async def use(pool: Any) -> None:
        with pytest.raises(NoWorker, match="its process has died") as caught:
            await pool.submit(Ask("emoji", Request())).result()
        response = answer("jobs", caught.value)
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert caught.value.hint == "more memory"

    with_pool(WorkerLost("its process has died", hint="more memory"), use)


def test_a_program_that_cannot_be_started():
    with pytest.raises(WorkerLost, match="cannot be started") as caught:
        asyncio.run(Child(CONFIG, ["/nowhere/python"]).start())
    assert "ask again" in caught.value.hint


def test_a_worker_that_takes_nothing_is_lost():
    async def use() -> None:
        child = Child(CONFIG, ["sleep", "60"])
        try:
            with pytest.raises(WorkerLost, match="did not move"):
                await child.start()
            with pytest.raises(WorkerLost, match=r"took nothing for 0\.3 s"):
                await child._send("run", [bytes(2**23)])
        finally:
            await child.end()

    asyncio.run(use())


def test_a_worker_ends_with_a_server_that_is_killed_within_a_frame():
    found = subprocess.run([sys.executable, "-m", "sdengine.serve.worker"], input=b"SDE1\0",
                           timeout=60, check=False)  # fmt: skip
    assert found.returncode == 0
