"""Upscaling and reading pictures, as AUTOMATIC1111's clients ask for it.

checked by  tests/http/test_webuiapi.py
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Call
from PIL import Image

from ..engine.errors import RequestError, TooLarge, UnknownName
from ..engine.inputs import open_picture
from ..engine.metadata import read_metadata
from ..engine.request import Request
from . import infotext
from .asks import Ask, Pictures
from .checks import size_of
from .encode import base64_of, decoded
from .faces import Json
from .sdapi_fields import ExtraBatch, ExtraImage, Extras, PngInfo, check_inert
from .served import Served, files, served

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"], default_response_class=Json)

Size = tuple[int, int]
RESAMPLING = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
LARGEST = 8.0  # times


@router.get("/upscalers")
async def upscalers(call: Call) -> Json:
    """Two that compute, and each model of the list that upscales."""
    models = [m for m in served(call).models if m.facts.variant == "x4-upscaler"]
    plain = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return Json(
        [{"name": name, **plain} for name in ("None", *RESAMPLING)]
        + [
            {**plain, "name": m.name, "model_name": m.name, "scale": m.facts.latent.factor}
            for m in models
        ]
    )


@router.post("/extra-single-image")
async def extra_single_image(body: ExtraImage, call: Call) -> Json:
    check_inert(body)
    made = await _upscaled(served(call), body, decoded(body.image, "image"), call)
    return Json({"html_info": "", "image": base64_of(made)})


@router.post("/extra-batch-images")
async def extra_batch_images(body: ExtraBatch, call: Call) -> Json:
    check_inert(body)
    here = served(call)
    most = here.config.limits.pictures
    if len(body.imageList) > most:
        raise TooLarge(f"{len(body.imageList)} pictures; at most {most}", hint="send fewer at once")
    encoded = [decoded(image.data, "imageList") for image in body.imageList]
    made = [await _upscaled(here, body, data, call) for data in encoded]
    return Json({"html_info": "", "images": [base64_of(data) for data in made]})


async def _upscaled(here: Served, body: Extras, data: bytes, call: Call) -> bytes:
    """A PNG."""
    size = size_of(data, here.config.limits.given)
    target = _target(body, size)
    width, height = target
    if width * height > here.config.limits.pixels:
        raise TooLarge(
            f"a picture of {width}x{height} is more than this server makes",
            hint="upscale less, or a smaller picture",
        )
    name = "None" if body.upscaler_1 is None else body.upscaler_1
    crop = body.resize_mode == 1 and body.upscaling_crop is not False
    if name == "None" or name in RESAMPLING:
        how = RESAMPLING.get(name, Image.Resampling.LANCZOS)
        return await asyncio.to_thread(_resized, lambda: open_picture(data), target, crop, how)
    models = {m.name: m for m in here.models if m.facts.variant == "x4-upscaler"}
    if name not in models:
        raise UnknownName("upscaler", name[:80], ["None", *RESAMPLING, *models])
    job = here.submit(Ask(name, Request(), Pictures((data,)), "sdapi"))
    (png,) = await files(await here.made(job, call))
    return await asyncio.to_thread(
        _resized, lambda: Image.open(io.BytesIO(png)), target, crop, Image.Resampling.LANCZOS
    )


def _target(body: Extras, size: Size) -> Size:
    """resize_mode 0 multiplies, 1 is a size."""
    if body.resize_mode == 1:
        width, height = body.upscaling_resize_w, body.upscaling_resize_h
        if width is None or height is None or min(width, height) < 1:
            raise RequestError(
                f"upscaling to {width}x{height}",
                hint="give upscaling_resize_w and upscaling_resize_h in pixels",
            )
        return width, height
    times = 2.0 if body.upscaling_resize is None else body.upscaling_resize
    if not 0 < times <= LARGEST:
        raise RequestError(
            f"upscaling {times:g} times", hint=f"give upscaling_resize up to {LARGEST:g}"
        )
    return max(1, round(size[0] * times)), max(1, round(size[1] * times))


def _resized(
    opened: Callable[[], Image.Image], target: Size, crop: bool, how: Image.Resampling
) -> bytes:
    image = opened().convert("RGB")
    box = None
    if crop:  # what has the target's proportions, around the middle
        share = min(image.width / target[0], image.height / target[1])
        width, height = target[0] * share, target[1] * share
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
    out = io.BytesIO()
    image.resize(target, how, box).save(out, "PNG")
    return out.getvalue()


@router.post("/png-info")
async def png_info(body: PngInfo, call: Call) -> Json:
    """What a picture says of its making, as text and by field."""
    data = decoded(body.image, "image")
    size_of(data, served(call).config.limits.given)
    found = await asyncio.to_thread(read_metadata, Path("the picture"), io.BytesIO(data))
    items: dict[str, Any] = {"parameters": found.parameters} if found.parameters else {}
    if found.request is not None:
        items["sdengine"] = {"request": dict(found.request), "about": dict(found.about)}
    text = found.parameters
    return Json({"info": text, "items": items, "parameters": infotext.parse(text)})
