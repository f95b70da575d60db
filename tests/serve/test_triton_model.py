"""The model of tritonserver's Python backend, with a stand-in for the module that the server gives.

The stand-in has of `triton_python_backend_utils` what its documentation says that a model may use.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdengine import api
from sdengine.engine.metadata import read_metadata
from sdengine.export import triton

pytestmark = pytest.mark.export


@dataclass
class Tensor:
    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor]
    error: Any = None


class TritonError(Exception):
    pass


@pytest.fixture
def model(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What model.py of a repository defines, initialised as the server does it."""
    utils = SimpleNamespace(
        Tensor=Tensor, InferenceResponse=InferenceResponse, TritonError=TritonError,
        get_input_tensor_by_name=lambda request, name: request.get(name),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    (tmp_path / "model.py").write_text(triton.MODEL)
    (tmp_path / "bundle").symlink_to(fake_bundle)
    spec = importlib.util.spec_from_file_location("model", tmp_path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    parameters = {"backend": {"string_value": "fake"}, "threads": {"string_value": "1"}}
    made.initialize({"model_config": json.dumps({"parameters": parameters})})
    yield made
    made.finalize()


def asked(request: Any, **pictures: bytes) -> dict[str, Tensor]:
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    values = {"request": text, **pictures}
    return {name: Tensor(name, np.array([one], np.object_)) for name, one in values.items()}


def test_pictures_are_those_of_the_pipeline(model: Any, fake_bundle: Path, tmp_path: Path) -> None:
    request = {"prompt": "a fox", "seed": 7, "steps": 2, "count": 2}
    (answer,) = model.execute([asked(request)])
    assert answer.error is None
    pictures, about = answer.output_tensors
    assert (pictures.name, about.name) == ("pictures", "about")
    with api.load(fake_bundle, backend="fake") as pipe:
        wanted = pipe(**request).images
    assert len(pictures.values) == 2
    for data, image in zip(pictures.values, wanted, strict=True):
        with Image.open(io.BytesIO(data)) as found:
            assert np.array_equal(np.asarray(found), np.asarray(image))
    (tmp_path / "x.png").write_bytes(pictures.values[1])
    assert read_metadata(tmp_path / "x.png").request["seed"] == 8
    assert json.loads(about.values[0])["timings"]["total"] > 0


def test_a_picture_is_begun_from(model: Any) -> None:
    def png(level: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(np.full((64, 128, 3), level, np.uint8)).save(out, "PNG")
        return out.getvalue()

    request = {"prompt": "a fox", "seed": 7, "steps": 4, "strength": 0.5}
    dark, light = (
        model.execute([asked(request, image=png(level))])[0].output_tensors[0].values[0]
        for level in (10, 240)
    )
    assert dark != light


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"a fox", 'no JSON object. send one string: {"prompt"'),
        (b"[1]", "no JSON object"),
        ({"prompt": "a fox", "stpes": 3}, "stpes"),
        ({"prompt": "a fox", "solver": "/etc/passwd"}, "a solver's file cannot be named"),
        ({"prompt": "a fox", "width": 4096, "height": 4096}, "ask for a smaller width"),
    ],
)
def test_a_bad_request_is_an_answer_and_no_trouble_to_others(
    model: Any, request_: Any, message: str
) -> None:
    bad, good = model.execute([asked(request_), asked({"prompt": "a fox", "steps": 1})])
    assert message in str(bad.error)
    assert bad.output_tensors == []
    assert good.error is None
