"""Jobs: submit, follow as server-sent events, cancel, fetch. The engine's own requests as they are.

    POST   /jobs                       {"request": {...}, "model", "image", "mask", "depth"} -> 202
    GET    /jobs/ID                    where it is
    GET    /jobs/ID/events             server-sent events; Last-Event-ID goes on after that one
    GET    /jobs/ID/pictures/0.png     a picture: png, jpeg or webp
    DELETE /jobs/ID                    call it off

checked by  tests/http/test_jobs_api.py
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path
from fastapi import Request as Call
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from ..engine.errors import NotFound
from ..engine.request import Request
from .asks import Ask, Pictures
from .encode import KINDS, base64_of, decoded, encoded, rough_png
from .faces import Json
from .jobs import Event, Job
from .served import Body, served

router = APIRouter(prefix="/jobs", tags=["jobs"], default_response_class=Json)

ALIVE_S = 15.0  # between two signs of life to a reader who waits
Id = Annotated[str, Path(max_length=64)]


class Submitted(Body):
    """`request` has the fields of sdengine.Request; pictures are base64."""

    request: dict[str, Any]
    model: str | None = None
    image: str | list[str] | None = None
    mask: str | None = None
    depth: str | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None


@router.post("", status_code=202)
async def submit(body: Submitted, call: Call) -> Json:
    """Into the queue; says where to look."""
    here = served(call)
    model = here.model(body.model)
    images = [body.image] if isinstance(body.image, str) else body.image
    pictures = Pictures(
        tuple(decoded(text, "image") for text in (images if images is not None else [])),
        None if body.mask is None else decoded(body.mask, "mask"),
        depth=None if body.depth is None else decoded(body.depth, "depth"),
    )
    request = Request.from_dict(body.request)
    job = here.submit(Ask(model.name, request, pictures, "jobs", body.deadline_s), keep=True)
    return Json(told(job), 202, {"Location": f"/jobs/{job.id}"})


@router.get("/{id}")
async def look(id: Id, call: Call) -> Json:
    return Json(told(served(call).pool.find(id)))


@router.delete("/{id}")
async def cancel(id: Id, call: Call) -> Json:
    """It ends at once, the engine at its next step; a job that is over stays as it is."""
    here = served(call)
    job = here.pool.find(id)
    here.pool.cancel(job)
    return Json(told(job))


@router.get("/{id}/pictures/{name}")
async def picture(id: Id, name: Annotated[str, Path(max_length=32)], call: Call) -> Response:
    job = served(call).pool.find(id)
    number, _, kind = name.partition(".")
    known = number.isdecimal() and number.isascii() and kind in KINDS
    if not known or int(number) >= len(job.made):
        raise NotFound(
            f"the job has no picture {name!r}; it has {len(job.made)}",
            hint=f"name one as 0.png, with an ending of {', '.join(KINDS)}",
        )
    data = await asyncio.to_thread(encoded, job.made[int(number)], kind)
    return Response(data, media_type=KINDS[kind][1])


@router.get("/{id}/events")
async def events(
    id: Id, call: Call, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """`step` events carry a small picture of what is coming, as a PNG in base64."""
    job = served(call).pool.find(id)
    seen = last_event_id if last_event_id is not None and last_event_id.isdecimal() else "-1"
    after = min(int(seen[:18]) + 1, len(job.events))
    return StreamingResponse(
        _stream(job, after), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _stream(job: Job, after: int) -> AsyncIterator[str]:
    follow = job.follow(after)
    pending = asyncio.ensure_future(anext(follow, None))
    try:
        while True:
            await asyncio.wait({pending}, timeout=ALIVE_S)
            if not pending.done():
                yield ": still here\n\n"
                continue
            found = pending.result()
            if found is None:
                return
            number, event = found
            yield f"id: {number}\nevent: {event.kind}\ndata: {_data(job, event)}\n\n"
            pending = asyncio.ensure_future(anext(follow, None))
    finally:
        pending.cancel()


def _data(job: Job, event: Event) -> str:
    fields = dict(event.fields)
    if event.kind == "step" and job.rough is not None and fields["step"] == job.step:
        fields["preview"] = base64_of(rough_png(job.rough))
    if event.kind == "picture":
        fields["url"] = f"/jobs/{job.id}/pictures/{fields['index']}.png"
    return json.dumps(fields)


def told(job: Job) -> dict[str, Any]:
    """What is said of a job."""
    error = job.error
    return {
        "id": job.id,
        "state": job.state,
        "model": job.ask.model,
        "progress": job.progress,
        "step": job.step,
        "steps": job.steps,
        "attempts": job.attempts,
        "pictures": [f"/jobs/{job.id}/pictures/{k}.png" for k in range(len(job.made))],
        "seeds": [made.request.seed for made in job.made],
        "warnings": job.warnings,
        "error": None
        if error is None
        else {"kind": type(error).__name__, "message": error.message, "hint": error.hint},
        "events": f"/jobs/{job.id}/events",
    }
