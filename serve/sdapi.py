"""AUTOMATIC1111's API, as its clients use it: /sdapi/v1.

checked by  tests/http/test_webuiapi.py (the client of that name), tests/http/test_sdapi_words.py
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from time import monotonic
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Call

from ..backends import machine
from ..engine import solvers
from ..engine.errors import RequestError
from ..engine.schedule import SCHEDULES
from ..engine.solvers.names import ALIASES
from .encode import base64_of, rough_png
from .faces import Json
from .jobs import Job
from .models import Model
from .sdapi_ask import OWN, SCHEDULERS, Meant, Options, info, meant
from .sdapi_fields import Img2Img, Making, Txt2Img
from .served import Served, files, served
from .shelf import resident

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"], default_response_class=Json)

IDLE: Mapping[str, Any] = {
    "skipped": False, "interrupted": False, "stopping_generation": False, "job": "",
    "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
}  # fmt: skip
EMPTY_LISTS = (
    "sd-vae", "loras", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles",
    "latent-upscale-modes", "script-info", "artists", "artist-categories",
)  # fmt: skip


def options_of(here: Served, call: Call) -> Options:
    """Those that were set, or the first model and the defaults."""
    found = getattr(call.app.state, "sdapi_options", None)
    return Options(here.model(None).name) if found is None else found


@router.post("/txt2img")
async def txt2img(body: Txt2Img, call: Call) -> Json:
    return await _made(body, call)


@router.post("/img2img")
async def img2img(body: Img2Img, call: Call) -> Json:
    return await _made(body, call)


async def _made(body: Making, call: Call) -> Json:
    here = served(call)
    options = options_of(here, call)
    if body.override_settings:
        options = options.changed(body.override_settings)
    model = here.model(options.sd_model_checkpoint)
    asked = meant(body, options, model)
    if body.override_settings and body.override_settings_restore_afterwards is False:
        call.app.state.sdapi_options = options.changed({"sd_model_checkpoint": model.name})
    job = here.submit(asked.ask)
    made = await here.made(job, call)
    kind, quality = options.samples_format, options.jpeg_quality
    pictures = await files(made, kind, quality) if body.send_images is not False else []
    told = info(asked, model, made, job.warnings, job.asked_at)
    return Json(
        {
            "images": [base64_of(data) for data in pictures],
            "parameters": _parameters(asked),
            "info": told,
        }
    )


def _parameters(asked: Meant) -> dict[str, Any]:
    """The body, with its pictures left out unless it asked for them."""
    given = asked.body.model_dump()
    if not given.get("include_init_images"):
        given |= {name: None for name in ("init_images", "mask") if name in given}
    return given


@router.get("/progress")
async def progress(call: Call, skip_current_image: bool = False) -> Json:
    """Of the job of this API that runs longest, as there: one at a time."""
    here = served(call)
    mine = [job for job in here.pool.running.values() if job.ask.face == "sdapi"]
    if not mine:
        count = sum(job.ask.face == "sdapi" for job in here.pool.waiting)
        state = {**IDLE, "job_count": count}
        return Json({"progress": 0.0, "eta_relative": 0.0, "state": state,
                     "current_image": None, "textinfo": None})  # fmt: skip
    job = mine[0]
    picture = None
    if job.rough is not None and not skip_current_image:
        picture = base64_of(await asyncio.to_thread(rough_png, job.rough, large=True))
    return Json({"progress": job.progress, "eta_relative": _eta(job), "state": _state(job),
                 "current_image": picture, "textinfo": None})  # fmt: skip


def _eta(job: Job) -> float:
    if job.begun is None or job.progress <= 0:
        return 0.0
    return (monotonic() - job.begun) * (1 - job.progress) / job.progress


def _state(job: Job) -> dict[str, Any]:
    return {
        **IDLE,
        "skipped": job.wish == "skip",
        "interrupted": job.wish == "interrupt",
        "job": job.id,
        "job_count": len(job.parts),
        "job_timestamp": str(int(job.asked_at)),
        "job_no": job.part,
        "sampling_step": job.step,
        "sampling_steps": job.steps,
    }


@router.post("/interrupt")
async def interrupt(call: Call) -> Json:
    """The running job of this API ends at its next step, with what there is of its pictures."""
    served(call).pool.wish("sdapi", "interrupt")
    return Json({})


@router.post("/skip")
async def skip(call: Call) -> Json:
    """The batch that runs ends at its next step; the job goes on with the next one."""
    served(call).pool.wish("sdapi", "skip")
    return Json({})


@router.get("/samplers")
async def samplers() -> Json:
    return Json(
        [
            {
                "name": solver.title,
                "aliases": [name, *ALIASES.get(name, ())],
                "options": {"scheduler": _label(solver.schedule)},
            }
            for name, solver in solvers.SOLVERS.items()
        ]
    )


def _label(schedule: str) -> str:
    theirs = (title for title, ours in SCHEDULERS.items() if ours == schedule)
    return next(theirs, f"{OWN}{schedule}")


@router.get("/schedulers")
async def schedulers() -> Json:
    theirs = {title: title.lower().replace(" ", "_") for title in ("Automatic", *SCHEDULERS)}
    named = SCHEDULERS.values()
    ours = {f"{OWN}{name}": f"{OWN}{name}" for name in SCHEDULES if name not in named}
    return Json(
        [
            {"name": name, "label": label, "aliases": None, "default_rho": -1.0,
             "need_inner_model": False}
            for label, name in {**theirs, **ours}.items()
        ]
    )  # fmt: skip


@router.get("/sd-models")
async def sd_models(call: Call) -> Json:
    return Json([_listed(model) for model in served(call).models])


def _listed(model: Model) -> dict[str, Any]:
    """`filename` is a name alone: where it lies is nobody's business."""
    return {
        "title": model.title,
        "model_name": model.name,
        "hash": model.hash,
        "sha256": model.facts.source.sha256,
        "filename": model.name,
        "config": None,
        "variant": model.facts.variant,
        "native_size": list(reversed(model.facts.native_size)),
        "licence": model.facts.licence,
    }


@router.get("/options")
async def get_options(call: Call) -> Json:
    here = served(call)
    options = options_of(here, call)
    model = here.model(options.sd_model_checkpoint)
    named = {"sd_model_checkpoint": model.title, "sd_checkpoint_hash": model.facts.source.sha256}
    return Json({**options.to_dict(), **named})


@router.post("/options")
async def set_options(body: dict[str, Any], call: Call) -> Json:
    here = served(call)
    options = options_of(here, call).changed(body)
    model = here.model(options.sd_model_checkpoint)
    # not the title: its hash is another one when the bundle is replaced
    call.app.state.sdapi_options = options.changed({"sd_model_checkpoint": model.name})
    return Json(None)


@router.get("/memory")
async def memory(call: Call) -> Json:
    pool = served(call).pool
    used = resident() + sum(child.rss for child in pool.children)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = machine.available_memory()
    return Json(
        {
            "ram": {"free": free, "used": used, "total": total},
            "cuda": {"error": "unavailable"},
        }
    )


@router.get("/cmd-flags")
async def cmd_flags(call: Call) -> Json:
    config = served(call).config
    return Json({"api": True, "nowebui": not config.ui, "listen": False, "port": config.port})


@router.get("/embeddings")
async def embeddings() -> Json:
    return Json({"loaded": {}, "skipped": {}})


@router.get("/scripts")
async def scripts() -> Json:
    return Json({"txt2img": [], "img2img": []})


@router.post("/refresh-checkpoints")
async def refresh(call: Call) -> Json:
    """Bundles that have changed are read anew whenever they are used; this reads them now."""
    list(served(call).models)
    return Json(None)


@router.post("/interrogate")
async def interrogate() -> Json:
    raise RequestError(
        "no model here says what is on a picture",
        hint="POST /sdapi/v1/png-info reads how a picture was made",
    )


def _empty(name: str) -> None:
    @router.get(f"/{name}", name=name)
    async def nothing() -> Json:
        return Json([])


for _name in EMPTY_LISTS:
    _empty(_name)
