"""What is refused before it takes a place in the queue.

No picture is unpacked here: of each the header is read, for its format and its size.

checked by  tests/http/test_checks.py
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from ..engine import tasks
from ..engine.bundle import ModelFacts
from ..engine.errors import RequestError, TooLarge
from ..engine.given import Given
from ..engine.request import Request
from ..engine.sources import FORMATS
from .asks import Ask
from .config import Limits

Size = tuple[int, int]  # width, height

BATCH = 4  # pictures of the largest size that may be in one network call


def check(ask: Ask, facts: ModelFacts, limits: Limits) -> None:
    """Raises RequestError, TooLarge; what only the engine can see is refused by the engine."""
    request = ask.request
    if request.solver is not None:
        raise RequestError(
            "a solver's file cannot be named in a request",
            hint="take a sampler by name: GET /sdapi/v1/samplers lists them",
        )
    _check_amount(request, limits)
    given = Given(ask.pictures.images, ask.pictures.mask, ask.pictures.depth)
    task = tasks.choose(facts, request.task, given)  # counts them, before any is looked at
    sizes = [size_of(blob, limits.given) for blob in ask.pictures.blobs]
    width, height = _made(request, facts, sizes if task.placed else (), task.name)
    if width * height > limits.pixels:
        raise TooLarge(
            f"a picture of {width}x{height} has {width * height:,} pixels; this server makes at"
            f" most {limits.pixels:,}",
            hint="ask for a smaller width and height",
        )
    if request.batch_size * width * height > BATCH * limits.pixels:
        raise TooLarge(
            f"{request.batch_size} pictures of {width}x{height} at once are too much",
            hint="ask for a smaller batch_size; count may stay",
        )


def _check_amount(request: Request, limits: Limits) -> None:
    found = {
        "pictures": (max(request.count, request.batch_size), limits.pictures),
        "steps": (_steps(request), limits.steps),
        "characters in the prompt": (len(request.prompt), limits.prompt),
        "characters in the negative prompt": (len(request.negative_prompt), limits.prompt),
    }
    for what, (asked, most) in found.items():
        if asked > most:
            raise TooLarge(
                f"{asked} {what}; this server takes at most {most}", hint=f"ask for fewer {what}"
            )


def _steps(request: Request) -> int:
    lists: list[Sequence[float] | None] = [request.sigmas, request.timesteps]
    lists += [request.guidance_scales, request.weights]
    named = 0 if request.steps is None else request.steps
    return max([named, *(len(values) for values in lists if values is not None)])


def _made(request: Request, facts: ModelFacts, given: Sequence[Size], task: str) -> Size:
    """The size of what is made, from what was asked, was given, or is the model's own."""
    tall, wide = facts.native_size
    width, height = given[0] if given else (wide, tall)
    if task == "upscale":
        return width * facts.latent.factor, height * facts.latent.factor
    if request.width is not None and request.height is None and given:
        height = max(1, round(height * request.width / width))
    elif request.height is not None and request.width is None and given:
        width = max(1, round(width * request.height / height))
    width = width if request.width is None else request.width
    height = height if request.height is None else request.height
    return width, height


def size_of(encoded: bytes, most: int) -> Size:
    """Of an encoded picture, from its header. Raises RequestError, TooLarge."""
    why = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded)) as image:
                width, height = image.size
                if image.format not in FORMATS:
                    why = f"it is a file of format {image.format}"
    except Image.DecompressionBombError as error:
        raise TooLarge(f"a picture is too large: {error}", hint="make it smaller first") from None
    except UnidentifiedImageError:  # its text is the address of a buffer
        why = "it begins like no known picture format"
    except Exception as error:  # whatever a decoder may stumble over in a damaged header
        why = f"{type(error).__name__}: {error}"[:200]
    if why:
        raise RequestError(
            f"a picture cannot be read: {why}",
            hint="give the bytes of an intact PNG, JPEG, WebP, GIF, BMP or TIFF file",
        )
    if width * height > most:
        raise TooLarge(
            f"a picture of {width}x{height} has {width * height:,} pixels; this server takes at"
            f" most {most:,}",
            hint="make it smaller first",
        )
    return width, height
