"""Same seed, one picture, whatever the batch: the model that ships with the package, OpenVINO.

Each picture of a batch of four against the same seed alone, for every task that the model does,
with a sampler that draws no noise and one that draws some in every step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdengine import api, backends
from sdengine.engine import solvers

pytestmark = [pytest.mark.ov, pytest.mark.slow]

IMAGES = Path(__file__).parents[2] / "docs" / "images"
LEAST = 60.0  # dB
SEED, COUNT = 41, 4
TASKS = {
    "txt2img": {},
    "img2img": {"image": IMAGES / "fox.png", "strength": 0.6},
    "inpaint": {"image": IMAGES / "face.png", "mask": IMAGES / "mask.png", "paste": False},
}


@pytest.fixture(scope="module")
def pipe():
    probe = backends.get("openvino").probe()
    if not probe.ok:
        pytest.skip(probe.reason)
    with api.load(backend="openvino", precision="f32", threads=1) as opened:
        yield opened


def psnr(a: Image.Image, b: Image.Image) -> float:
    """dB between two pictures of 8 bits; infinite where they are equal."""
    square = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return float("inf") if square == 0 else float(10 * np.log10(255**2 / square))


def test_the_samplers_are_one_of_each_kind():
    assert not solvers.find("dpmpp_2m").noisy
    assert not solvers.find("dpmpp_2m").eta
    assert solvers.find("euler_a").default_eta == 1.0


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
@pytest.mark.parametrize("task", TASKS)
def test_alone_and_in_a_batch(pipe, task, sampler):
    asked = {
        "prompt": "a panda", "steps": 6, "guidance": 3.0, "sampler": sampler, "task": task,
        "watermark": False, **TASKS[task],
    }  # fmt: skip
    together = pipe(**asked, seed=SEED, count=COUNT, batch_size=COUNT).images
    alone = [pipe(**asked, seed=SEED + k).images[0] for k in range(COUNT)]
    found = [psnr(a, b) for a, b in zip(together, alone, strict=True)]
    assert min(found) >= LEAST
    # and the seeds do make four pictures, so that their order is seen too
    others = [psnr(together[k], together[k - 1]) for k in range(COUNT)]
    assert max(others) < 40


def test_a_short_last_batch(pipe):
    """Three pictures two at a time: the third, alone in its batch, is its seed's."""
    asked = {"prompt": "a panda", "steps": 6, "guidance": 3.0, "watermark": False}
    together = pipe(**asked, seed=SEED, count=3, batch_size=2).images
    assert len(together) == 3
    assert psnr(together[2], pipe(**asked, seed=SEED + 2).images[0]) >= LEAST
