"""A checkpoint so small that tracing and judging it takes seconds: two levels, two text blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 32,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "embed_dim": 4,
}
TEXT = {
    "width": 32,
    "layers_stored": 3,
    "layers_used": 2,
    "heads": 2,
    "vocab_size": 49408,
    "context_length": 77,
    "pad_id": 0,
}
CONFIGS = {"unet": UNET, "vae": VAE, "text": TEXT}


@pytest.fixture(scope="session")
def mini_file(tmp_path_factory) -> Path:
    """The checkpoint in float16, with its config beside it; native size 32 pixels."""
    import torch
    from safetensors.torch import save_file

    from sdengine.export.expected import networks

    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for prefix, modules in networks(CONFIGS).items():
        for module in modules:
            for name, shape in ((n, t.shape) for n, t in module.state_dict().items()):
                values = torch.randn(shape, generator=generator)
                if name.endswith("bias"):
                    values *= 0.1
                elif len(shape) > 1:
                    values *= shape[1:].numel() ** -0.5
                else:
                    values = 1 + 0.1 * values  # the gain of a norm
                tensors[prefix + name] = values.half()
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    save_file(tensors, path)
    params = {
        "parameterization": "v",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
        "scale_factor": 0.18215,
        "image_size": 16,
        "unet_config": {"params": UNET},
        "first_stage_config": {
            "params": {
                "embed_dim": 4,
                "ddconfig": {k: v for k, v in VAE.items() if k != "embed_dim"},
            }
        },
        "cond_stage_config": {"params": TEXT},
    }
    path.with_suffix(".yaml").write_text(json.dumps({"model": {"params": params}}))
    return path


@pytest.fixture(scope="session")
def mini(mini_file):
    """The opened checkpoint."""
    from sdengine.export.checkpoint import open_checkpoint

    return open_checkpoint(mini_file)


@pytest.fixture(scope="session")
def exported(mini, tmp_path_factory):
    """(the bundle, component name -> its model right after tracing), of one whole export."""
    from sdengine.export import export_bundle, graphs

    models = {}
    trace = graphs.trace

    def spy(module, spec, **options):
        models[spec.name] = trace(module, spec, **options)
        return models[spec.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "trace", spy)
        bundle = export_bundle(mini, tmp_path_factory.mktemp("bundles") / "mini", cuts=(0, 1))
    return bundle, models


@pytest.fixture(scope="session")
def mini_bundle(exported) -> Path:
    """The checkpoint as a bundle, proved on OpenVINO in float32 and, where it can, bfloat16."""
    return exported[0]


@pytest.fixture(scope="session")
def traced(exported):
    """component name -> the traced model; weights are inputs. Do not change them."""
    return exported[1]


@pytest.fixture(scope="session")
def mini_parts(mini):
    """component name -> Part"""
    from sdengine.export.components import parts

    return {p.name: p for p in parts(mini.facts, mini.configs, (0, 1))}
