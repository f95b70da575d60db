"""Every Stable Diffusion 2 variant goes through the whole export, and its bundle opens again.

`base` is tests/parity/test_export.py's. Tiny random checkpoints, float32, OpenVINO and ONNX Runtime
against torch; what is measured of bfloat16 and of full-size models stands in docs/numerics.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdengine.backends import get
from sdengine.engine.bundle import STATISTICS, open_bundle
from sdengine.engine.spec import Profile
from sdengine.engine.weights import read_tensors
from sdengine.export.checkpoint import open_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.ort, pytest.mark.slow]

NETWORKS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
COMPANION = {
    "inpainting": set(),
    "depth": {"depth"},
    "x4-upscaler": set(),
    "unclip-h": {"image_encoder"},
    "unclip-l": {"image_encoder"},
}
WITH_COMPANION = [v for v, names in COMPANION.items() if names]


@pytest.mark.parametrize("variant", COMPANION)
def test_variant_is_exported_and_proved(variant_bundle, variant):
    bundle = open_bundle(variant_bundle(variant), verify=True)
    assert bundle.facts.variant == variant
    assert set(bundle.components) == NETWORKS | COMPANION[variant]
    assert (bundle.facts.low_scale is not None) == (variant == "x4-upscaler")
    assert (bundle.facts.image_conditioning is not None) == variant.startswith("unclip")
    for name in bundle.components:
        records = [r for r in bundle.parity if r.component == name and "(" not in r.case]
        assert {("openvino", "f32"), ("onnxruntime", "f32")} == {
            (r.runtime, r.precision) for r in records
        }
        assert all(r.psnr_db is None or r.psnr_db >= 80 for r in records)


@pytest.mark.parametrize("variant", COMPANION)
def test_bundle_is_a_checkpoint_again(variant_bundle, variant):
    """As adding a target reads it: the same facts, the same networks."""
    path = variant_bundle(variant)
    bundle, again = open_bundle(path), open_checkpoint(path)
    assert replace(again.facts, name=bundle.facts.name) == bundle.facts
    for name in COMPANION[variant]:
        assert again.configs[name] == bundle.components[name].config


@pytest.mark.parametrize("variant", WITH_COMPANION)
def test_torch_runs_the_companion_too(variant_bundle, variant):
    """Both backends, at a shape that the export did not use."""
    bundle = open_bundle(variant_bundle(variant))
    (name,) = COMPANION[variant]
    component = bundle.component(name)
    (taken,), (given,) = component.spec.inputs, component.spec.outputs
    dims = {"B": 3, "H": 64, "W": 96}
    shape = taken.resolve(dims)
    feeds = {taken.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    profile = Profile({d: dims[d] for d in component.spec.dims})
    results = []
    for backend in ("openvino", "torch"):
        session = get(backend).load(component, profile)
        results.append(session(feeds)[given.name])
        session.close()
    assert results[0].shape == given.resolve(dims)
    assert results[0].std() > 1e-3
    np.testing.assert_allclose(results[0], results[1], atol=1e-4 * float(np.abs(results[1]).max()))


def test_statistics_lie_beside_the_tower(variant_bundle, embedding_stats):
    bundle = open_bundle(variant_bundle("unclip-l"))
    assert bundle.facts.image_conditioning.statistics
    found = read_tensors(bundle.component("image_encoder").weights, STATISTICS)
    for value, wanted in zip(found.values(), torch.load(embedding_stats), strict=True):
        assert np.array_equal(value, wanted.numpy())


def test_classes_of_the_unet(variant_bundle):
    taken = {v: open_bundle(variant_bundle(v)).component("unet").spec for v in COMPANION}
    labels = {v: [(t.dtype, t.shape) for t in s.inputs[3:]] for v, s in taken.items()}
    assert labels == {
        "inpainting": [],
        "depth": [],
        "x4-upscaler": [("int64", ("B",))],
        "unclip-h": [("float32", ("B", 64))],
        "unclip-l": [("float32", ("B", 64))],
    }
    channels = {v: s.input("sample").shape[1] for v, s in taken.items()}
    assert channels == {
        "inpainting": 9,
        "depth": 5,
        "x4-upscaler": 7,
        "unclip-h": 4,
        "unclip-l": 4,
    }
