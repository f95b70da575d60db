"""The pipeline as a model of tritonserver's Python backend.

`sdengine export --layout triton` writes the repository around it (export/triton.py).

    request     JSON: the fields of sdengine.Request
    image, mask, depth      picture files, where the task takes some
    pictures    PNG files, each with how it was made
    about       JSON: seconds of each stage, warnings

checked by  tests/serve/test_triton_model.py
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import images
from ..engine.errors import RequestError, SdengineError
from ..engine.request import Request
from .asks import Ask, Pictures
from .checks import check
from .config import Limits

# parameters of config.pbtxt -> keyword arguments of sdengine.load
LOADING = {"backend": str, "precision": str, "device": str, "threads": int}


class Model:
    """`bundle` is set by model.py, which lies beside it."""

    bundle: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        from .. import api

        self._server: Any = importlib.import_module("triton_python_backend_utils")
        given = json.loads(args["model_config"]).get("parameters", {})
        how: dict[str, Any] = {
            name: kind(given[name]["string_value"])
            for name, kind in LOADING.items()
            if name in given
        }
        self._pipe = api.load(self.bundle, **how)
        self._facts = self._pipe.facts

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One answer for each: what is wrong with one is no trouble to the others."""
        return [self._answer(one) for one in requests]

    def finalize(self) -> None:
        self._pipe.close()

    def _answer(self, asked: Any) -> Any:
        server = self._server
        try:
            found = self._run(asked)
        except SdengineError as error:
            told = server.TritonError(f"{error.message}. {error.hint}")
            return server.InferenceResponse(output_tensors=[], error=told)
        tensors = [
            server.Tensor(name, np.array(values, np.object_)) for name, values in found.items()
        ]
        return server.InferenceResponse(output_tensors=tensors)

    def _run(self, asked: Any) -> dict[str, list[bytes]]:
        request = _request(self._bytes(asked, "request"))
        image = self._bytes(asked, "image")
        mask, depth = (next(iter(self._bytes(asked, name)), None) for name in ("mask", "depth"))
        check(Ask("", request, Pictures(tuple(image), mask, depth=depth)), self._facts, Limits())
        pictures: dict[str, Any] = {"image": image, "mask": mask, "depth": depth}
        result = self._pipe(request, **{name: one for name, one in pictures.items() if one})
        files = [images.encode(p.image, Path("x.png"), p.text()) for p in result.pictures]
        about = {"timings": vars(result.timings), "warnings": result.warnings}
        return {"pictures": files, "about": [json.dumps(about).encode()]}

    def _bytes(self, asked: Any, name: str) -> list[bytes]:
        tensor = self._server.get_input_tensor_by_name(asked, name)
        return [] if tensor is None else [bytes(one) for one in tensor.as_numpy().ravel()]


def _request(given: list[bytes]) -> Request:
    """Raises RequestError."""
    try:
        (text,) = given
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RequestError(
            "the input `request` is no JSON object",
            hint='send one string: {"prompt": "a fox", "seed": 7}',
        )
    return Request.from_dict(values)
