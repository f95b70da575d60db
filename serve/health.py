"""Whether it lives, whether it can make pictures, and what it has done."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as Call
from fastapi.responses import Response

from .. import __version__
from .faces import Json
from .served import served
from .shelf import resident

router = APIRouter(tags=["health"], default_response_class=Json)


@router.get("/health/live")
async def live() -> Json:
    """The process answers. It says nothing of the engine: a restart would not mend that."""
    return Json({"live": True, "version": __version__})


@router.get("/health/ready", responses={503: {"description": "not yet, or not any more"}})
async def ready(call: Call) -> Json:
    """A worker has its model open and has run it once."""
    here = served(call)
    pool = here.pool
    state = {
        "ready": pool.ready,
        "stopping": pool.stopping,
        "workers": len(pool.warm),
        "waiting": len(pool.waiting),
        "running": len(pool.running),
    }
    return Json(state, 200 if pool.ready else 503)


@router.get("/metrics")
async def metrics(call: Call) -> Response:
    """For Prometheus."""
    here = served(call)
    here.pool.metrics.memory.labels("server").set(resident())
    media = "text/plain; version=0.0.4; charset=utf-8"
    return Response(here.pool.metrics.text(), media_type=media)
