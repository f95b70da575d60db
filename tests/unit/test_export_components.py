"""The table of components against the key lists of every published variant."""

from __future__ import annotations

import json

import pytest

from sdengine.engine.bundle import (
    LatentFacts,
    ModelFacts,
    ScheduleFacts,
    SourceFacts,
    TokenizerFacts,
)
from sdengine.engine.spec import TensorSpec
from sdengine.export.components import parts

pytestmark = pytest.mark.export

VARIANTS = ["base", "inpainting", "depth", "x4-upscaler", "unclip-h", "unclip-l"]


def described(config, variant):
    latent = LatentFacts(
        config["latent_channels"], config["scale_factor"], config["latent_down_factor"], 8
    )
    facts = ModelFacts(
        name="x",
        variant=variant,
        prediction="eps",
        schedule=ScheduleFacts("scaled_linear", 0.00085, 0.012, 1000),
        latent=latent,
        native_size=(512, 512),
        tokenizer=TokenizerFacts(49406, 49407, 0, 77),
        licence="",
        source=SourceFacts("x", "0" * 64, "safetensors", "plain"),
    )
    return {p.name: p for p in parts(facts, {k: config[k] for k in ("unet", "vae", "text")})}


@pytest.mark.parametrize("variant", VARIANTS)
def test_components_take_the_tensors_of_the_published_files(variant, golden_file):
    keys = json.loads(golden_file(f"keys/{variant}.json").read_text())
    found = described(keys["config"], variant)
    shapes = {n: tuple(t["shape"]) for n, t in keys["tensors"].items()}
    for part in found.values():
        state = part.empty().state_dict()
        for name in part.tensor_names():
            assert tuple(state[name.removeprefix(part.prefix)].shape) == shapes[name]
    used = {n for p in found.values() for n in p.tensor_names()}
    networks = [n for n in shapes if n.startswith(("model.diffusion_model.", "first_stage_model."))]
    assert not [n for n in networks if n not in used]


@pytest.mark.parametrize(
    ("variant", "channels", "labels"),
    [
        ("base", 4, ()),
        ("inpainting", 9, ()),
        ("depth", 5, ()),
        ("x4-upscaler", 7, (TensorSpec("class_labels", "int64", ("B",)),)),
        ("unclip-h", 4, (TensorSpec("class_labels", "float32", ("B", 2048)),)),
        ("unclip-l", 4, (TensorSpec("class_labels", "float32", ("B", 1536)),)),
    ],
)
def test_specs_of_the_variants(variant, channels, labels, golden_file):
    """Channels and class vectors as reference-spec, table 0, has them."""
    config = json.loads(golden_file(f"keys/{variant}.json").read_text())["config"]
    found = described(config, variant)
    unet = found["unet"].spec
    assert unet.inputs == (
        TensorSpec("sample", "float32", ("B", channels, "h", "w")),
        TensorSpec("timestep", "float32", ("B",)),
        TensorSpec("encoder_hidden_states", "float32", ("B", "T", 1024)),
        *labels,
    )
    assert unet.outputs == (TensorSpec("out_sample", "float32", ("B", 4, "h", "w")),)
    assert found["text_encoder"].spec.outputs[0].shape == ("B", 77, 1024)
    assert found["vae_encoder"].spec.outputs[0].shape == ("B", 8, "h", "w")
    assert found["vae_decoder"].spec.inputs[0].shape == ("B", 4, "h", "w")


def test_configs_are_plain_json(golden_file):
    config = json.loads(golden_file("keys/base.json").read_text())["config"]
    for part in described(config, "base").values():
        assert json.loads(json.dumps(part.config)) == part.config
