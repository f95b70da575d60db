"""OpenAI's images API: /v1/images and /v1/models.

checked by  tests/http/test_openai.py (the client of that name)
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from time import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Call
from fastapi.responses import Response, StreamingResponse

from ..engine.errors import RequestError, SdengineError
from ..engine.request import Request
from .asks import Ask, Pictures
from .encode import KINDS, base64_of, rough_png
from .faces import Json, answer, status_of
from .jobs import Job
from .models import Model
from .openai_fields import OURS, Edit, Generation, Variation, fitted, form_of, size_of
from .served import Served, chosen, files, served
from .urls import Urls

router = APIRouter(prefix="/v1", tags=["openai"], default_response_class=Json)

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        "prompt": {"type": "string"},
                        "n": {"type": "integer"},
                        "size": {"type": "string"},
                        "seed": {"type": "integer"},
                        "steps": {"type": "integer"},
                    },
                    "required": ["image"],
                }
            }
        },
    }
}


@router.post("/images/generations")
async def generations(body: Generation, call: Call) -> Response:
    return await _answered(body, Pictures(), call)


@router.post("/images/edits", openapi_extra=FORM)
async def edits(call: Call) -> Response:
    """With a mask, what is transparent in it is made anew; without one, all of the picture."""
    form = await form_of(call)
    body = fitted(Edit, form.fields)
    return await _answered(body, Pictures(form.images, form.mask, "clear"), call)


@router.post("/images/variations", openapi_extra=FORM)
async def variations(call: Call) -> Response:
    """By a model of picture variations as it does; by another as img2img without a prompt."""
    form = await form_of(call)
    body = fitted(Variation, form.fields)
    if form.mask is not None:
        raise RequestError("variations take no mask", hint="POST /v1/images/edits takes one")
    return await _answered(body, Pictures(form.images), call)


async def _answered(body: Generation, pictures: Pictures, call: Call) -> Response:
    here = served(call)
    model = here.model(body.model)
    count = 1 if body.n is None else body.n
    given = chosen({name: getattr(body, name, None) for name in OURS})
    request = Request(
        prompt=body.prompt, count=count, batch_size=1, long_prompt=True, **size_of(body.size),
        **given,
    )  # fmt: skip
    ask = Ask(model.name, request, pictures, "openai")
    job = here.submit(ask)
    kind = "png" if body.output_format is None else body.output_format
    if body.stream:
        event = "image_generation" if not pictures else "image_edit"
        stream = _streamed(here, job, body, kind, event)
        return StreamingResponse(stream, media_type="text/event-stream")
    made = await here.made(job, call)
    data = await files(made, kind, body.output_compression)
    created = int(time())
    if body.response_format == "url":
        urls: Urls = call.app.state.urls
        base = str(call.base_url).rstrip("/")
        listed = [{"url": f"{base}/v1/images/files/{urls.keep(each, kind)}"} for each in data]
    else:
        listed = [{"b64_json": base64_of(each)} for each in data]
    size = f"{made[0].width}x{made[0].height}"
    return Json({"created": created, "data": listed, "output_format": kind, "size": size,
                 "background": "opaque"})  # fmt: skip


async def _streamed(
    here: Served, job: Job, body: Generation, kind: str, event: str
) -> AsyncIterator[str]:
    """Partial pictures, as many as were asked for, spread over the steps; then each picture."""
    wanted = 0 if body.partial_images is None else body.partial_images
    sent = 0
    common = {"created_at": int(time()), "output_format": kind, "background": "opaque"}
    try:
        async for _, told in job.follow():
            if told.kind == "step" and job.rough is not None and sent < wanted:
                if job.progress * (wanted + 1) < sent + 1:
                    continue
                partial = {"b64_json": base64_of(rough_png(job.rough, large=True)), **common}
                yield _event(f"{event}.partial_image", {"partial_image_index": sent, **partial})
                sent += 1
            if told.kind == "picture":
                (data,) = await files([job.made[told.fields["index"]]], kind)
                yield _event(f"{event}.completed", {"b64_json": base64_of(data), **common})
        if job.error is not None:
            yield _failed(job.error)
    finally:
        here.pool.cancel(job)


def _event(kind: str, fields: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def _failed(error: SdengineError) -> str:
    body = bytes(answer("openai", error, status=status_of(error)).body)
    return f"event: error\ndata: {body.decode()}\n\n"


@router.get("/images/files/{name}")
async def file(name: str, call: Call) -> Response:
    """A picture that was answered as an address: kept for a while, in memory alone."""
    urls: Urls = call.app.state.urls
    data, kind = urls.find(name)
    return Response(data, media_type=KINDS[kind][1])


@router.get("/models")
async def models(call: Call) -> Json:
    return Json({"object": "list", "data": [_listed(model) for model in served(call).models]})


@router.get("/models/{name}")
async def model(name: str, call: Call) -> Json:
    return Json(_listed(served(call).model(name)))


def _listed(model: Model) -> dict[str, Any]:
    created = 0 if model.mark is None else model.mark[1] // 10**9
    return {"id": model.name, "object": "model", "created": created, "owned_by": "sdengine"}
