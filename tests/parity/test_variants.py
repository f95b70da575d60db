"""Every Stable Diffusion 2 variant goes through the whole export, and its bundle opens again."""

from __future__ import annotations

import pytest

from sdengine.engine.bundle import open_bundle

pytestmark = [pytest.mark.export, pytest.mark.ov]

NETWORKS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
COMPANION = {
    "inpainting": set(),
    "depth": {"depth"},
    "x4-upscaler": set(),
    "unclip-h": {"image_encoder"},
    "unclip-l": {"image_encoder"},
}


@pytest.mark.parametrize("variant", COMPANION)
def test_variant_is_exported_and_proved(variant_bundle, variant):
    bundle = open_bundle(variant_bundle(variant))
    assert bundle.facts.variant == variant
    assert set(bundle.components) == NETWORKS | COMPANION[variant]
    for name in bundle.components:
        records = [r for r in bundle.parity if r.component == name and "(" not in r.case]
        assert {("openvino", "f32"), ("onnxruntime", "f32")} <= {
            (r.runtime, r.precision) for r in records
        }
        assert all(r.psnr_db is None or r.psnr_db >= 80 for r in records)
