"""What OpenAI's clients send for pictures, from a JSON body or a form.

Beside its own fields each takes ours by name (`seed`, `steps`, `guidance`, `sampler`, ...): clients
have a way to send more (`extra_body`). A field that neither knows is refused, as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as Call

from ..engine.errors import RequestError
from .served import Body

FILES = 16


class Generation(Body):
    """POST /v1/images/generations. `quality`, `style`, `user`, `moderation` and the like are taken
    and change nothing: there is one quality, steps and guidance make it."""

    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    stream: bool | None = False
    partial_images: int | None = Field(default=None, ge=0, le=3)
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # ours
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    preset: str | None = None
    strength: float | None = None
    safety: str | None = None


class Edit(Generation):
    """The fields of the form of /v1/images/edits, beside its files `image` and `mask`."""

    input_fidelity: str | None = None
    mask_blur: float | None = None


class Variation(Edit):
    """The fields of the form of /v1/images/variations, beside its file `image`."""

    prompt: str = ""


OURS = (
    "negative_prompt", "seed", "steps", "guidance", "sampler", "schedule", "preset", "strength",
    "safety", "mask_blur",
)  # fmt: skip


def size_of(text: str | None) -> dict[str, Any]:
    """`512x768` -> width and height; `auto` and nothing leave it to the model or the picture."""
    if text is None or text == "auto":
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if not found:
        raise RequestError(
            f"size is {text[:40]!r}", hint="give it as 512x768, width first, or auto"
        )
    return {"width": int(found[1]), "height": int(found[2])}


@dataclass(frozen=True)
class Form:
    fields: dict[str, Any]
    images: tuple[bytes, ...]
    mask: bytes | None


class _InMemory(MultiPartParser):
    """Nothing of a request goes to the disk: its size was limited before."""

    spool_max_size = 2**40


async def form_of(call: Call) -> Form:
    """The form of a request, read into memory. Raises RequestError for one that is none."""
    kind = call.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise RequestError(
            f"the body is {kind[:60]!r}, not multipart/form-data", hint="send the picture as a file"
        )
    limit = call.app.state.served.config.limits.body
    parser = _InMemory(
        Headers(raw=call.headers.raw), call.stream(), max_files=FILES + 1, max_fields=100,
        max_part_size=limit,
    )  # fmt: skip
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = error.message if isinstance(error, MultiPartException) else repr(error)
        raise RequestError(
            f"the form cannot be read: {why[:200]}", hint="send multipart/form-data"
        ) from None
    return await _read(form)


async def _read(form: FormData) -> Form:
    fields: dict[str, Any] = {}
    images: list[bytes] = []
    mask: bytes | None = None
    for name, value in form.multi_items():
        plain = name.removesuffix("[]")
        if not isinstance(value, UploadFile):
            fields[name] = value
        elif plain == "image":
            images.append(await value.read())
        elif plain == "mask" and mask is None:
            mask = await value.read()
        else:
            raise RequestError(f"no file called {name[:60]!r} is taken", hint="image, and mask")
    if "image" in fields or "mask" in fields:
        raise RequestError(
            "image and mask are files", hint="send their bytes; addresses and paths are not opened"
        )
    if not images:
        raise RequestError("no file called 'image'", hint="send the picture as a file of that name")
    return Form(fields, tuple(images), mask)


class Misfit(RequestError):
    """`param` is the field that does not fit."""

    def __init__(self, message: str, *, hint: str, param: str) -> None:
        super().__init__(message, hint=hint)
        self.param = param


def fitted(kind: type[Generation], fields: Mapping[str, Any]) -> Generation:
    """A form's texts as a body's values. Raises Misfit."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))[:200]
        raise Misfit(
            f"{param}: {first['msg']}"[:500], hint="GET /openapi.json describes each", param=param
        ) from None
