"""The server as one ASGI application.

checked by  tests/http
"""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException

from .. import __version__
from ..engine.errors import NotFound, RequestError, SdengineError
from . import health, jobs_api, openai_api, sdapi, sdapi_extras
from .config import Config
from .faces import Json, answer, face_of
from .guard import Guard
from .models import Models
from .pool import Pool
from .served import Served
from .urls import Urls

log = logging.getLogger("sdengine.serve")

ERRORS = {
    code: {"description": text}
    for code, text in {
        400: "a request that cannot be served as asked",
        401: "no token, or an unknown one",
        404: "no such model, job or picture",
        413: "too many bytes, pixels, pictures or steps",
        422: "a body that does not fit",
        429: "the queue is full: Retry-After says when to come again",
        500: "the engine failed",
        503: "the server is going down, or a model cannot be opened",
        504: "the request's time is over",
    }.items()
}


def create_app(config: Config) -> FastAPI:
    """The whole server: `uvicorn.run(create_app(config))`. Its workers start with it.

    app.state.served    config, models and pool, for what is mounted into it
    raises              BundleError, StorageError when a model cannot be opened
    """
    # Pillow's own guard, behind checks.size_of: it refuses above twice this
    Image.MAX_IMAGE_PIXELS = max(config.limits.given, config.limits.pixels)
    pool = Pool(config)
    parts = Served(config, Models(config.models), pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # What is here stays: else each full collection walks through it, 30 ms in which nobody is
        # answered, three times that with the page.
        gc.collect()
        gc.freeze()
        pool.start()
        try:
            yield
        finally:
            await pool.close()

    app = FastAPI(
        title="sdengine", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        default_response_class=Json, responses={k: dict(v) for k, v in ERRORS.items()},
    )  # fmt: skip
    app.state.served = parts
    app.state.urls = Urls(config.keep_s, config.keep_bytes)
    for module in (health, jobs_api, sdapi, sdapi_extras, openai_api):
        app.include_router(module.router)
    if config.ui:
        from .ui import mount  # Gradio takes seconds to import

        mount(app, parts)
    app.add_exception_handler(SdengineError, _expected)
    app.add_exception_handler(RequestValidationError, _misshapen)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, config=config, pool=pool)
    return app


async def _expected(call: Call, error: Exception) -> Json:
    assert isinstance(error, SdengineError)
    call.app.state.served.pool.metrics.refused.labels(type(error).__name__).inc()
    return answer(face_of(call.url.path), error, param=getattr(error, "param", None))


async def _misshapen(call: Call, error: Exception) -> Json:
    """A body or parameter that does not fit: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    where = place[:200] if place else str(first["loc"][0])
    told = RequestError(
        f"{where}: {first['msg']}"[:500], hint="GET /openapi.json describes each request"
    )
    face = face_of(call.url.path)
    call.app.state.served.pool.metrics.refused.labels("misfit").inc()
    return answer(face, told, status=400 if face == "openai" else 422, param=where)


async def _http(call: Call, error: Exception) -> Json:
    """Starlette's own: no such route, a method that it does not have, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    code = error.status_code
    what = {
        404: f"there is no {call.url.path[:200]}",
        405: f"{call.url.path[:200]} does not take {call.method}",
    }.get(code, str(error.detail)[:500])
    kind = NotFound if code in (404, 405) else RequestError
    told = kind(what, hint="GET /openapi.json lists what there is")
    response = answer(face_of(call.url.path), told, status=code)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _unexpected(call: Call, error: Exception) -> Json:
    log.error("unexpected, in %s", call.url.path, exc_info=error)
    told = SdengineError(
        f"unexpected {type(error).__name__}", hint="report this; the server's log shows where"
    )
    return answer(face_of(call.url.path), told)
