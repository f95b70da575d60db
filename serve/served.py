"""What every route needs: the server's parts, and a job followed until it or its client is gone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import Request as Call
from pydantic import BaseModel, ConfigDict

from .asks import Ask, Made
from .checks import check
from .config import Config
from .encode import encoded
from .jobs import Job
from .models import Model, Models
from .pool import Pool


@dataclass(frozen=True)
class Served:
    config: Config
    models: Models
    pool: Pool

    def submit(self, ask: Ask, *, keep: bool = False) -> Job:
        """Checked, then into the queue. Raises RequestError, TooLarge, NotFound, QueueFull."""
        check(ask, self.models.find(ask.model).facts, self.config.limits)
        return self.pool.submit(ask, keep=keep)

    def model(self, name: str | None) -> Model:
        return self.models.find(name)

    async def made(self, job: Job, call: Call) -> list[Made]:
        """The job's pictures. When the client goes first the job is called off.

        raises      what the job failed with
        """
        gone = asyncio.create_task(_gone(call))
        done = asyncio.create_task(job.result())
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                self.pool.cancel(job)
            return await done
        finally:
            self.pool.cancel(job)
            gone.cancel()
            done.cancel()


async def _gone(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


def served(call: Call) -> Served:
    found: Served = call.app.state.served
    return found


async def files(made: list[Made], kind: str = "png", quality: int | None = None) -> list[bytes]:
    """Picture files. Packing lets other threads run, and the event loop with them."""
    return [await asyncio.to_thread(encoded, one, kind, quality) for one in made]


class Body(BaseModel):
    """A request's body: a number is finite, and an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def chosen(values: dict[str, Any]) -> dict[str, Any]:
    """Those that were given: for the others the called thing's own defaults hold."""
    return {name: value for name, value in values.items() if value is not None}
