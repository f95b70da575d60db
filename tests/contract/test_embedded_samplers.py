"""The model that ships with the package: one seed is one picture on three backends, each sampler.

Few steps, one small picture a sampler; torch in float32 is the yardstick.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine import solvers

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.ort, pytest.mark.slow]

ASKED = {"prompt": "a slice of pizza", "steps": 6, "guidance": 3.0, "seed": 11}


@pytest.fixture(scope="module")
def pipes():
    """A pipeline for each backend that is here; in CI all three must be."""
    names = [n for n in ("torch", "openvino", "onnxruntime")
             if os.environ.get("CI") or backends.get(n).probe().ok]  # fmt: skip
    if "torch" not in names or len(names) < 2:
        pytest.skip(f"only {names} can run here: nothing to compare")
    opened = {name: api.load(backend=name, precision="f32", threads=1) for name in names}
    yield opened
    for pipe in opened.values():
        pipe.close()


def psnr(a, b):
    """dB between two pictures of 8 bits."""
    square = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return np.inf if square == 0 else 10 * np.log10(255**2 / square)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_one_seed_one_picture(pipes, name):
    solver = solvers.find(name)
    asked = {**ASKED, "sampler": name, "steps": ASKED["steps"] // solver.calls}
    if solver.eta:
        asked["eta"] = solver.default_eta
    drawn = {backend: pipe(**asked).image for backend, pipe in pipes.items()}
    assert np.asarray(drawn["torch"]).std() > 10  # a picture, not a flat one
    for backend, image in drawn.items():
        assert psnr(image, drawn["torch"]) >= 45, backend
