"""Each API's own shape of an error, made from the same exceptions.

| exception | status |
|---|---|
| RequestError and its kin | 400 |
| Forbidden | 401 without a good token, 403 for a page of another site |
| NotFound | 404 |
| Cancelled | 409 |
| TooLarge | 413 |
| what does not fit the API's schema | 422 (OpenAI: 400) |
| QueueFull | 429, Retry-After |
| the engine failed; its process was lost twice | 500 |
| Stopping; no worker that starts; a bundle that is gone or damaged | 503, Retry-After |
| DeadlinePassed | 504 |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi.responses import Response

from ..engine import errors
from ..engine.errors import QueueFull, SdengineError

Face = Literal["sdapi", "openai", "jobs"]

STATUS: tuple[tuple[type[SdengineError], int], ...] = (
    (errors.RequestError, 400),
    (errors.Forbidden, 401),
    (errors.NotFound, 404),
    (errors.Cancelled, 409),
    (errors.TooLarge, 413),
    (errors.QueueFull, 429),
    (errors.Stopping, 503),
    (errors.NoWorker, 503),
    (errors.BundleError, 503),
    (errors.DeadlinePassed, 504),
    (SdengineError, 500),
)
RETRY_S = 10  # after what is over soon by itself
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "queue_full"}


class Json(Response):
    """ASCII alone, whatever is in it: half a surrogate pair in a prompt is no reason to fail."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def face_of(path: str) -> Face:
    if path.startswith("/sdapi/"):
        return "sdapi"
    return "openai" if path.startswith("/v1/") else "jobs"


def status_of(error: SdengineError) -> int:
    return next(status for kind, status in STATUS if isinstance(error, kind))


def _sdapi(status: int, error: SdengineError, param: str | None) -> dict[str, Any]:
    """As AUTOMATIC1111's handler of exceptions; the hint is ours."""
    return {
        "error": type(error).__name__,
        "detail": error.message,
        "body": "" if param is None else param,
        "errors": error.message,
        "hint": error.hint,
    }


def _openai(status: int, error: SdengineError, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": f"{error.message}. {error.hint}",
            "type": OPENAI_TYPES.get(status, kind),
            "param": param,
            "code": OPENAI_CODES.get(status),
        }
    }


def _jobs(status: int, error: SdengineError, param: str | None) -> dict[str, Any]:
    found = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"error": {**found, **({} if param is None else {"param": param})}}


SHAPES: Mapping[Face, Callable[[int, SdengineError, str | None], dict[str, Any]]] = {
    "sdapi": _sdapi,
    "openai": _openai,
    "jobs": _jobs,
}


def answer(
    face: Face, error: SdengineError, *, status: int | None = None, param: str | None = None
) -> Json:
    """The response that says `error` in the shape of `face`."""
    code = status_of(error) if status is None else status
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(math.ceil(error.after))
    elif code == 503:
        headers["Retry-After"] = str(RETRY_S)
    elif code == 401:
        headers["WWW-Authenticate"] = 'Basic realm="sdengine", charset="UTF-8"'
    return Json(SHAPES[face](code, error, param), code, headers)
