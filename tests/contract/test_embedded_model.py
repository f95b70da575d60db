"""The model that ships with the package: one seed is one picture on every backend."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine.bundle import open_bundle
from sdengine.engine.metadata import read_metadata

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.ort]

ASKED = {"prompt": "a slice of pizza", "steps": 12, "guidance": 5.0, "seed": 7}


def draw(backend, **fields):
    probe = backends.get(backend).probe()
    if not probe.ok and not os.environ.get("CI"):
        pytest.skip(probe.reason)
    with api.load(backend=backend, precision="f32", threads=1) as pipe:
        return pipe(**{**ASKED, **fields})


def psnr(a, b):
    """dB between two pictures of 8 bits."""
    square = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return np.inf if square == 0 else 10 * np.log10(255**2 / square)


@pytest.fixture(scope="module")
def reference():
    """torch in float32: the yardstick."""
    return draw("torch")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_one_seed_one_picture(reference, backend):
    found = draw(backend)
    assert psnr(found.image, reference.image) >= 50
    assert np.abs(found.pictures[0].latent - reference.pictures[0].latent).max() < 1e-2


def test_it_is_a_picture(reference):
    """Not flat, not noise: neighbours differ far less than the whole picture does."""
    pixels = np.asarray(reference.image, float)
    assert pixels.shape == (*open_bundle(api.EMBEDDED["emoji"]).facts.native_size, 3)
    assert pixels.std() > 30
    assert np.abs(np.diff(pixels, axis=0)).mean() < 0.15 * pixels.std()


def test_the_prompt_decides(reference):
    assert psnr(draw("torch", prompt="a fox").image, reference.image) < 20


def test_files_are_what_the_manifest_says():
    """Computed here again, file by file: what is in git is what was judged."""
    bundle = open_bundle(api.EMBEDDED["emoji"], verify=True)
    assert sum(r.size for r in bundle.files.values()) < 34e6
    for name, record in bundle.files.items():
        content = (bundle.path / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record.sha256


def test_a_picture_can_be_made_again_from_its_file(reference, tmp_path):
    read = read_metadata(reference.pictures[0].save(tmp_path / "pizza.png"))
    again = draw("torch", **read.request)
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(reference.image))
