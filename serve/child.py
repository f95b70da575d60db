"""The server's end of one worker: starts it, talks to it, ends it when it hangs.

checked by  tests/http/test_pool.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from ..engine import errors
from ..engine.errors import SdengineError, WorkerLost
from . import wire
from .config import Config
from .place import placed
from .wire import Message

# -P: nothing is imported from the folder that it happens to be in
COMMAND = [
    sys.executable,
    "-P",
    "-m",
    "sdengine.serve.worker",
]


class Child:
    """A worker process, one run at a time. `running` is the number of it, `rss` what the process
    last said that it holds."""

    def __init__(self, config: Config, command: Sequence[str] = COMMAND) -> None:
        self._config, self._command = config, command
        self._process: asyncio.subprocess.Process | None = None
        self._run = 0
        self.running: int | None = None
        self.rss = 0
        self.models: list[str] = []
        self.batch_pays = False
        self.crowded = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Started and warm. Raises SdengineError when the model cannot be opened, WorkerLost."""
        pipe = asyncio.subprocess.PIPE
        seen, device = placed(self._config.engine.device, os.environ)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, start_new_session=True, limit=2**20,
                env={**os.environ, **seen},
            )  # fmt: skip
        except OSError as error:
            raise _lost(f"it cannot be started: {error}") from None
        config = self._config
        models = {name: str(path) for name, path in config.models.items()}
        engine = {**asdict(config.engine), "device": device}
        await self._send("begin", models=models, engine=engine, memory=config.memory)
        await self._expect("ready", config.open_s)
        measure = config.batch is None
        await self._send("warm", model=config.default_model, measure=measure)
        warmed = await self._expect("warmed", config.open_s)
        self.batch_pays = bool(warmed.fields["batch_pays"])
        self.models = [config.default_model]

    async def run(
        self, model: str, requests: Sequence[dict[str, Any]], about: dict[str, Any],
        blobs: Sequence[bytes],
    ) -> AsyncIterator[Message]:  # fmt: skip
        """What it says of a run, the last one `done`, `failed` or `stopped`. Raises WorkerLost."""
        self._run += 1
        self.running = self._run
        await self._send("run", blobs, run=self._run, model=model, requests=requests, **about)
        limit = self._config.open_s
        while True:
            message = await self._next(limit)
            if message.kind in ("done", "failed", "stopped"):
                self.running = None
            if message.fields.get("run") != self._run:
                raise WorkerLost(
                    f"the worker spoke of run {message.fields.get('run')}, not {self._run}",
                    hint="report this",
                )
            if message.kind == "step":
                last = message.fields["step"] == message.fields["steps"]
                limit = self._config.open_s if last else self._config.hang_s
            yield message
            if self.running is None:
                return

    async def stop(self, run: int) -> None:
        """It ends the run at its next step; a run that is over already is left alone."""
        with contextlib.suppress(WorkerLost):
            await self._send("stop", run=run)

    async def died(self) -> None:
        """Returns when the process is gone."""
        assert self._process is not None
        await self._process.wait()

    async def end(self) -> None:
        """Kill it, if it lives; it has nothing that must be saved."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self._process = self.running = None

    async def _send(self, kind: str, blobs: Sequence[bytes] = (), **fields: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(wire.pack(kind, fields, blobs))
            async with asyncio.timeout(self._config.open_s):
                await self._process.stdin.drain()
        except TimeoutError:
            raise _lost(f"it took nothing for {self._config.open_s:g} s") from None
        except (OSError, RuntimeError):
            raise _lost("it takes no more") from None

    async def _next(self, limit: float) -> Message:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            # not wait_for: in Python 3.11 that loses a cancellation that comes with the message
            async with asyncio.timeout(limit):
                message = await wire.receive(self._process.stdout)
        except TimeoutError:
            raise _lost(f"it did not move for {limit:g} s") from None
        except (wire.BadFrame, OSError) as error:
            raise _lost(str(error)) from None
        if message is None:
            raise _lost("its process has died")
        self.rss = message.fields.get("rss", self.rss)
        self.models = message.fields.get("models", self.models)
        self.crowded = message.fields.get("crowded", self.crowded)
        return message

    async def _expect(self, kind: str, limit: float) -> Message:
        message = await self._next(limit)
        if message.kind == "failed":
            raise failure(message)
        if message.kind != kind:
            raise _lost(f"it said {message.kind!r} where {kind!r} was due")
        return message


def failure(message: Message) -> SdengineError:
    """The exception that a `failed` or `refused` message tells of."""
    name = message.fields.get("error", "RequestError")
    kind = getattr(errors, name, SdengineError)
    plain = isinstance(kind, type) and issubclass(kind, SdengineError)
    error = SdengineError(message.fields["message"], hint=message.fields["hint"])
    if not plain or kind is SdengineError:
        return error
    # UnknownName and QueueFull are made from other arguments; both are made whole here
    made = kind.__new__(kind)
    SdengineError.__init__(made, error.message, hint=error.hint)
    assert isinstance(made, SdengineError)
    return made


def _lost(why: str) -> WorkerLost:
    return WorkerLost(
        f"the engine's process was lost: {why}",
        hint="ask again; if it happens each time, the model may need more memory than there is",
    )
