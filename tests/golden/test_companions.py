"""The networks beside the three that every variant has: depth network and image tower.

References: the original's own results on small and full-size random weights; timm's ResNet-ViT and
open_clip's towers with random weights of ours. Tolerances as in test_networks.py.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdengine.export.companions import MEAN, STD, depth_config, image_config
from sdengine.export.modules import depth, image_encoder

pytestmark = pytest.mark.export

Arrays = dict[str, np.ndarray]
Golden = Callable[[str], tuple[dict[str, Any], Arrays]]
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-6}


def shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def filled(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
    """The module with weights by name; every name that it has must be there."""
    module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
    return module.eval()


def worst(found: Tensor, wanted: Tensor | np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - torch.as_tensor(wanted).double()).abs().max())


# -- depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "float64"])
@torch.inference_mode()
def test_small_depth_network(golden: Golden, dtype: torch.dtype) -> None:
    case, arrays = golden("depth_small")
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items()}
    stated = {"heads": case["config"]["depth_model"]["vit"]["heads"]}
    config = depth.DepthConfig.from_dict(depth_config(shapes(tensors), stated))
    network = filled(depth.DepthNetwork(config), tensors, depth.PREFIX).to(dtype)
    out = network(tensors["in.x"])
    assert out.std() > 0.01
    wanted = arrays["out.raw_f64" if dtype == torch.float64 else "out.raw"]
    assert worst(out, wanted.reshape(out.shape)) < LIMIT[dtype]


@torch.inference_mode()
def test_full_depth_network(golden: Golden, golden_file: Callable[[str], Path], tmp_path) -> None:
    case, arrays = golden("depth_full")
    rule = case["weights_rule"]
    script = golden_file("keys/depth.json").parents[1] / "make_checkpoint.py"
    path = tmp_path / "depth.safetensors"
    options = [f"--{k}={rule[k]}" for k in ("variant", "scale", "seed", "dtype")]
    command = [sys.executable, script, *options, "--only", "depth_model.", "--out", path, "--quiet"]
    subprocess.run(command, check=True)
    tensors = {n: t.float() for n, t in load_file(path).items()}
    config = depth.DepthConfig.from_dict(depth_config(shapes(tensors), {}))
    assert config == depth.DepthConfig()
    network = filled(depth.DepthNetwork(config), tensors, depth.PREFIX)
    out = network(torch.from_numpy(arrays["in.x"]))
    assert worst(out, arrays["out.raw"].reshape(out.shape)) < 1e-4


def randomised(module: nn.Module) -> nn.Module:
    """Every weight random, biases and norms too."""
    generator = torch.Generator().manual_seed(7)
    for value in module.parameters():
        fan = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=generator)
        base = 1.0 if value.ndim == 1 else 0.0
        value.data = base + noise * (0.1 if value.ndim == 1 else fan**-0.5)
    return module.eval()


@torch.inference_mode()
def test_backbone_is_timms() -> None:
    """The tokens after the last block, on a picture of another size than the embedding's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm", reason="the reference of this test")
        reference = timm.create_model(
            "vit_base_r50_s16_384",
            pretrained=False,
            img_size=96,
            embed_dim=48,
            num_heads=3,
            num_classes=0,
            global_pool="",
        )
    tensors = {f"pretrained.model.{n}": t for n, t in randomised(reference).state_dict().items()}
    config = depth.DepthConfig(width=48, heads=3, grid=6)
    ours = filled(depth.Backbone(config), tensors, "pretrained.model.")
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    _, taps, _ = ours(image)
    wanted = reference.forward_features(image)
    found = nn.functional.layer_norm(
        taps[-1], (48,), reference.norm.weight, reference.norm.bias, 1e-6
    )
    assert worst(found, wanted) < 1e-4


# -- image tower -------------------------------------------------------------------------------


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


@pytest.mark.parametrize("variant", ["unclip-h", "unclip-l"])
@torch.inference_mode()
def test_image_tower_of_the_pipelines(golden: Golden, make_checkpoint, variant: str) -> None:
    case, arrays = golden(f"pipeline_{variant.replace('-', '_')}")
    tensors = {n: t.float() for n, t in load_file(make_checkpoint(variant)).items()}
    stated = {"heads": case["config"]["image_embedder"]["heads"]}
    config = image_encoder.ImageConfig(**image_config(shapes(tensors), stated, variant))
    assert config.activation == case["config"]["image_embedder"]["activation"]
    tower = filled(image_encoder.ImageEncoder(config), tensors, image_encoder.PREFIX)
    picture = torch.from_numpy(arrays["in.image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1
    # The original's resize, where both sides grow: no blur, corners kept.
    square = nn.functional.interpolate(picture, (224, 224), mode="bicubic", align_corners=True)
    pixels = ((square + 1) / 2 - column(MEAN)) / column(STD)
    assert worst(pixels[..., ::8, ::8], arrays["out.clip_input_every8"]) < 1e-4
    assert worst(tower(pixels), arrays["out.embedding"]) < 1e-4


@pytest.mark.parametrize(("quick", "activation"), [(False, "gelu"), (True, "quick_gelu")])
@torch.inference_mode()
def test_image_tower_is_open_clips(quick: bool, activation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip", reason="the reference of this test")
        from open_clip.transformer import QuickGELU, VisionTransformer
    reference = randomised(
        VisionTransformer(
            image_size=56,
            patch_size=14,
            width=64,
            layers=3,
            heads=4,
            mlp_ratio=4.0,
            output_dim=24,
            act_layer=QuickGELU if quick else nn.GELU,
        )
    )
    tensors = dict(reference.state_dict())
    config = image_encoder.ImageConfig(64, 3, 4, 14, 56, 24, activation)  # type: ignore[arg-type]
    tower = filled(image_encoder.ImageEncoder(config), tensors, "")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    assert worst(tower(pixels), reference(pixels)) < 1e-4
