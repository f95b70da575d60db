"""The modules' tensors against the tensor lists of the published files, full size and small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdengine.export.modules import text, unet, vae

pytestmark = pytest.mark.export

VARIANTS = ["base", "inpainting", "depth", "x4-upscaler", "unclip-h", "unclip-l"]


@pytest.mark.parametrize("scale", ["", ".tiny"], ids=["full", "tiny"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes(golden_file: Callable[[str], Path], variant: str, scale: str) -> None:
    listed = json.loads(golden_file(f"keys/{variant}{scale}.json").read_text())
    config = listed["config"]
    tower = text.TextConfig.from_ldm(config["text"])
    with torch.device("meta"):
        modules = [
            (unet.PREFIX, unet.UNet(unet.UNetConfig.from_ldm(config["unet"]))),
            (vae.PREFIX, vae.VAEEncoder(vae.VAEConfig.from_ldm(config["vae"]))),
            (vae.PREFIX, vae.VAEDecoder(vae.VAEConfig.from_ldm(config["vae"]))),
            (text.PREFIX, text.TextEncoder(tower)),
        ]
    found = {
        prefix + name: list(tensor.shape)
        for prefix, module in modules
        for name, tensor in module.state_dict().items()
    }
    unused = tuple(
        text.PREFIX + name
        for name in (f"transformer.resblocks.{tower.layers}.", "text_projection", "logit_scale")
    )
    expected = {
        name: tensor["shape"]
        for name, tensor in listed["tensors"].items()
        if name.startswith((unet.PREFIX, vae.PREFIX, text.PREFIX)) and not name.startswith(unused)
    }
    assert found == expected
    assert any(name.startswith(unused) for name in listed["tensors"])
