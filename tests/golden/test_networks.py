"""The networks against the reference implementation's own, on its small random weights.

Tolerances: float32 1e-4 (two float32 implementations differ by 5e-6 for a UNet pass, 4e-5 for a
decoder); float64 1e-6, where only the reference's float32 time sinusoid is left to differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdengine.export.modules import text, unet, vae

pytestmark = pytest.mark.export

Arrays = dict[str, np.ndarray]
Golden = Callable[[str], tuple[dict[str, Any], Arrays]]

LIMIT = {torch.float32: 1e-4, torch.float64: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d).removeprefix("torch."))
UNETS = ["unet_base", "unet_inpainting", "unet_depth", "unet_x4", "unet_unclip"]


def loaded(module: nn.Module, arrays: Arrays, prefix: str, dtype: torch.dtype) -> nn.Module:
    """The module with the case's weights; every name it has must be there."""
    weights = {name: torch.from_numpy(arrays[prefix + name]) for name in module.state_dict()}
    module.load_state_dict(weights, strict=True)
    return module.eval().to(dtype)


def run(module: nn.Module, *inputs: np.ndarray | None) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(*(None if x is None else torch.from_numpy(x) for x in inputs))
    return result


def worst(result: Tensor, expected: np.ndarray) -> float:
    assert tuple(result.shape) == expected.shape
    return float(np.abs(result.double().numpy() - expected).max())


def expected(arrays: Arrays, name: str, dtype: torch.dtype) -> np.ndarray:
    return arrays[f"out.{name}_f64" if dtype == torch.float64 else f"out.{name}"]


@pytest.mark.parametrize("case", UNETS)
@DTYPES
def test_unet(golden: Golden, case: str, dtype: torch.dtype) -> None:
    facts, arrays = golden(case)
    network = unet.UNet(unet.UNetConfig.from_ldm(facts["config"]["unet"]))
    loaded(network, arrays, unet.PREFIX, dtype)
    out = run(network, arrays["in.x"], arrays["in.t"], arrays["in.context"], arrays.get("in.y"))
    assert out.dtype == dtype
    assert worst(out, expected(arrays, "eps", dtype)) < LIMIT[dtype]


@pytest.mark.parametrize("case", ["vae_f8", "vae_f4"])
@DTYPES
def test_vae(golden: Golden, case: str, dtype: torch.dtype) -> None:
    facts, arrays = golden(case)
    config = vae.VAEConfig.from_ldm(facts["config"]["vae"])
    encoder = loaded(vae.VAEEncoder(config), arrays, vae.PREFIX, dtype)
    decoder = loaded(vae.VAEDecoder(config), arrays, vae.PREFIX, dtype)
    moments = run(encoder, arrays["in.image"])
    assert worst(moments, expected(arrays, "moments", dtype)) < LIMIT[dtype]
    assert worst(run(decoder, arrays["in.z"]), expected(arrays, "decoded", dtype)) < LIMIT[dtype]


@DTYPES
def test_text_tower(golden: Golden, dtype: torch.dtype) -> None:
    facts, arrays = golden("text_tower")
    network = text.TextEncoder(text.TextConfig.from_ldm(facts["config"]["text"]))
    loaded(network, arrays, text.PREFIX, dtype)
    out = run(network, arrays["in.ids"])
    assert worst(out, expected(arrays, "penultimate", dtype)) < LIMIT[dtype]
    # The tower's last block is not run; a tower that runs it is far off.
    assert worst(out, arrays["out.last"]) > 0.1


@pytest.mark.parametrize("case", [*UNETS, "vae_f8", "vae_f4", "text_tower"])
def test_configs_survive_json(golden: Golden, case: str) -> None:
    facts = golden(case)[0]["config"]
    config: Any
    if "unet" in facts:
        config = unet.UNetConfig.from_ldm(facts["unet"])
    elif "vae" in facts:
        config = vae.VAEConfig.from_ldm(facts["vae"])
    else:
        config = text.TextConfig.from_ldm(facts["text"])
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("unet_base", torch.bfloat16), ("unet_base", torch.float16), ("unet_x4", torch.bfloat16)],
    ids=str,
)
def test_half_precision_stays_close(golden: Golden, case: str, dtype: torch.dtype) -> None:
    """Half precision weights: no overflow, error of the size of the format's own rounding."""
    facts, arrays = golden(case)
    network = unet.UNet(unet.UNetConfig.from_ldm(facts["config"]["unet"]))
    loaded(network, arrays, unet.PREFIX, dtype)
    out = run(network, arrays["in.x"], arrays["in.t"], arrays["in.context"], arrays.get("in.y"))
    limit = 0.15 if dtype == torch.bfloat16 else 0.02  # about 20 roundings of values up to 4
    assert out.dtype == dtype
    assert worst(out, arrays["out.eps_f64"]) < limit
