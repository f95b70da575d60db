"""A bundle read as a checkpoint, by docs/bundle-format.md: weight files and facts only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from sdengine.engine.errors import BadConfig, NotACheckpoint, TensorMismatch
from sdengine.export.checkpoint import open_checkpoint

pytestmark = pytest.mark.export

SOURCE = {"file": "emoji.safetensors", "sha256": "ab" * 32, "kind": "safetensors", "weights": "ema"}
PARTS = {
    "unet": ("model.diffusion_model.",),
    "vae_encoder": ("first_stage_model.encoder.", "first_stage_model.quant_conv."),
    "vae_decoder": ("first_stage_model.decoder.", "first_stage_model.post_quant_conv."),
    "text_encoder": ("cond_stage_model.model.",),
}
VAE = {
    "ch": 32,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_channels": 4,
    "embed_dim": 4,
    "in_channels": 3,
    "out_ch": 3,
}
CONFIGS = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attention_ds": [1, 2, 4],
        "head_channels": 16,
        "num_heads": None,
        "context_dim": 64,
        "num_classes": None,
        "adm_in_channels": None,
        "cross_only": [],
    },
    "vae_encoder": VAE,
    "vae_decoder": VAE,
    "text_encoder": {
        "width": 64,
        "layers": 3,
        "heads": 4,
        "vocab_size": 49408,
        "context_length": 77,
    },
}


def unused(name):
    return name.startswith(
        (
            "cond_stage_model.model.transformer.resblocks.3.",
            "cond_stage_model.model.text_projection",
            "cond_stage_model.model.logit_scale",
        )
    )


@pytest.fixture
def bundle(base_arrays, tmp_path) -> Path:
    """The folder, as the format's page lays it out, of format number 0: no reader opens it."""
    folder = tmp_path / "emoji"
    components = {}
    for name, prefixes in PARTS.items():
        file = folder / name / "weights.safetensors"
        file.parent.mkdir(parents=True)
        arrays = {n: a for n, a in base_arrays.items() if n.startswith(prefixes) and not unused(n)}
        save_file(arrays, file)
        weights = f"{name}/weights.safetensors"
        components[name] = {"weights": weights, "config": CONFIGS[name], "graphs": {}}
    model = {
        "name": "emoji",
        "variant": "base",
        "prediction": "v",
        "schedule": {
            "kind": "scaled_linear",
            "beta_start": 0.001,
            "beta_end": 0.013,
            "timesteps": 1000,
        },
        "latent": {"channels": 4, "scale": 0.5, "factor": 8, "multiple": 8},
        "native_size": [128, 128],
        "tokenizer": {"file": "t.gz", "start": 49406, "end": 49407, "pad": 3, "length": 77},
        "licence": "MIT",
        "source": SOURCE,
    }
    manifest = {"format": 0, "model": model, "components": components}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def change(bundle, edit):
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_weights_and_facts_of_a_bundle(bundle, base_arrays):
    checkpoint = open_checkpoint(bundle)
    assert checkpoint.kind == "bundle"
    for name, ref in checkpoint.tensors.items():
        assert ref.torch().numpy().tobytes() == base_arrays[name].tobytes()
    facts = checkpoint.facts
    assert (facts.name, facts.variant, facts.prediction) == ("emoji", "base", "v")
    assert facts.native_size == (128, 128)
    assert (facts.schedule.beta_start, facts.schedule.beta_end) == (0.001, 0.013)
    assert facts.latent.scale == 0.5
    assert facts.tokenizer.pad == 3
    assert facts.licence == "MIT"
    assert checkpoint.configs["unet"]["num_head_channels"] == 16
    assert checkpoint.configs["text"]["layers_used"] == 3


def test_the_origin_survives(bundle):
    """Writing a bundle again does not make the bundle its own source."""
    source = open_checkpoint(bundle).facts.source
    assert {k: getattr(source, k) for k in SOURCE} == SOURCE


@pytest.mark.parametrize("broken", [None, {"file": "a"}, {**SOURCE, "sha256": 5}, "text"])
def test_without_a_sound_origin_the_bundle_is_the_source(bundle, broken):
    change(bundle, lambda m: m["model"].update(source=broken))
    checkpoint = open_checkpoint(bundle)
    assert checkpoint.facts.source.file == "emoji"
    assert checkpoint.facts.source.sha256 == checkpoint.sha256


def test_several_parts_in_one_file(bundle, base_arrays):
    """Two components may point at one weight file."""
    arrays = {n: a for n, a in base_arrays.items() if n.startswith("first_stage_model.")}
    save_file(arrays, bundle / "vae.safetensors")

    def edit(manifest):
        for name in ("vae_encoder", "vae_decoder"):
            manifest["components"][name]["weights"] = "vae.safetensors"

    change(bundle, edit)
    assert len(open_checkpoint(bundle).tensors) == 686 + 248 + 40


@pytest.mark.parametrize(
    "weights", ["../outside.safetensors", "/etc/passwd", "a\\b", "", None, "unet/../../x"]
)
def test_paths_stay_inside(bundle, weights):
    change(bundle, lambda m: m["components"]["unet"].update(weights=weights))
    with pytest.raises(NotACheckpoint, match="no path inside the bundle") as caught:
        open_checkpoint(bundle)
    assert "who wrote it" in caught.value.hint


@pytest.mark.parametrize("key", ["model", "components"])
def test_a_manifest_of_something_else(bundle, key):
    change(bundle, lambda m: m.pop(key))
    with pytest.raises(NotACheckpoint, match="not the manifest of a bundle") as caught:
        open_checkpoint(bundle)
    assert "sdengine export" in caught.value.hint


def test_troubles_of_a_bundle(bundle):
    change(bundle, lambda m: m["model"].update(prediction="x0"))
    with pytest.raises(BadConfig, match="prediction is 'x0'"):
        open_checkpoint(bundle)
    change(bundle, lambda m: m["model"].update(prediction="v", latent=[1]))
    with pytest.raises(BadConfig, match="latent is"):
        open_checkpoint(bundle)
    (bundle / "unet" / "weights.safetensors").unlink()
    change(bundle, lambda m: m["model"].update(latent={}))
    with pytest.raises(NotACheckpoint, match=r"weights\.safetensors does not exist"):
        open_checkpoint(bundle)
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(NotACheckpoint, match="not sound JSON"):
        open_checkpoint(bundle)


def test_a_part_left_out(bundle):
    change(bundle, lambda m: m["components"].pop("vae_decoder"))
    with pytest.raises(TensorMismatch, match=r"missing: first_stage_model\.decoder"):
        open_checkpoint(bundle)
