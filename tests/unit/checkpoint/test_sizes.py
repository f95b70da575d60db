"""Sizes, variant and tensor lists of all six models, against the key lists of the reference."""

from __future__ import annotations

import json

import pytest

from sdengine.engine.errors import BadConfig, NotACheckpoint, TensorMismatch, UnknownFact
from sdengine.export.containers import TensorRef
from sdengine.export.expected import COMPANIONS, expected_shapes, select
from sdengine.export.sizes import text_config, unet_config, vae_config
from sdengine.export.variants import find_variant, refuse_others

pytestmark = pytest.mark.export

VARIANTS = ["base", "inpainting", "depth", "x4-upscaler", "unclip-h", "unclip-l"]
# What a config holds beside what the networks need to know.
DECORATION = {
    "image_size",
    "legacy",
    "resolution",
    "dropout",
    "attn_type",
    "arch",
    "layer",
    "pad_id",
    "start_id",
    "end_id",
    "disable_middle_self_attn",
}


@pytest.fixture(scope="module")
def keys(golden_file):
    """`keys(variant, scale)` -> the key list's config, and name -> shape."""

    def read(variant, scale):
        end = ".tiny.json" if scale == "tiny" else ".json"
        document = json.loads(golden_file(f"keys/{variant}{end}").read_text())
        shapes = {name: tuple(e["shape"]) for name, e in document["tensors"].items()}
        return document["config"], shapes

    return read


def unread(shapes):
    """Tensors of these shapes whose bytes nobody may ask for."""

    def read():
        raise AssertionError("a header check read a tensor")

    return {name: TensorRef(name, "F16", shape, read) for name, shape in shapes.items()}


def all_configs(shapes, stated):
    return {
        "unet": unet_config(shapes, stated.get("unet", {})),
        "vae": vae_config(shapes, stated.get("vae", {})),
        "text": text_config(shapes, stated.get("text", {})),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_configs_are_read_off_the_shapes(keys, variant, scale):
    """At full size without any config; the small ones with theirs, as they share no family rule."""
    want, shapes = keys(variant, scale)
    found = all_configs(shapes, want if scale == "tiny" else {})
    for part in ("unet", "vae", "text"):
        for name, value in want[part].items():
            if name in DECORATION:
                continue
            if name == "attention_resolutions":
                value = sorted(value)
            if name == "disable_self_attentions" and scale == "full":
                # Level 0 has no transformer; what is said of it cannot be seen and has no effect.
                assert found[part][name][1:] == value[1:]
                continue
            assert found[part][name] == value, (part, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_tensor_of_the_list_has_its_place(keys, variant, scale):
    """The networks' own names and shapes, companions and known extras: together the whole list."""
    want, shapes = keys(variant, scale)
    configs = all_configs(shapes, want)
    assert find_variant(shapes, None) == variant
    expected = expected_shapes(configs)
    kept = select(unread(shapes), expected, variant, configs["text"]["layers_used"])
    companions = {n for n in shapes if n.startswith(COMPANIONS[variant] or ("\0",))}
    assert set(kept) == set(expected) | companions
    assert all(kept[name].shape == shapes[name] for name in kept)
    left = set(shapes) - set(kept)
    last = f"cond_stage_model.model.transformer.resblocks.{want['text']['layers_used']}."
    assert all(
        n.startswith(
            (last, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit")
        )
        or "." not in n
        for n in left
    ), sorted(left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_models_need_a_config_for_their_heads(keys, variant):
    _, shapes = keys(variant, "tiny")
    with pytest.raises(UnknownFact, match="heads") as caught:
        unet_config(shapes, {})
    assert "--config" in caught.value.hint
    with pytest.raises(UnknownFact, match="heads of a text tower of width 64") as caught:
        text_config(shapes, {})
    assert "--config" in caught.value.hint


def test_text_blocks_that_run(keys):
    _, shapes = keys("base", "full")
    prefix = "cond_stage_model.model."
    bare = {n: s for n, s in shapes.items() if n != prefix + "text_projection"}
    short = {n: s for n, s in bare.items() if ".resblocks.23." not in n}
    assert text_config(shapes, {})["layers_used"] == 23
    assert text_config(short, {})["layers_used"] == 23
    assert text_config(short, {"layer": "penultimate"})["layers_used"] == 23
    assert text_config(shapes, {"layer": "last"})["layers_used"] == 24
    assert text_config(shapes, {"layers_used": 20})["layers_used"] == 20
    _, tiny = keys("base", "tiny")
    tiny = {n: s for n, s in tiny.items() if n != prefix + "text_projection"}
    with pytest.raises(UnknownFact, match="how many of the 4 stored text blocks run") as caught:
        text_config(tiny, {"heads": 4, "layer": "penultimate"})
    assert "--config" in caught.value.hint
    with pytest.raises(BadConfig, match="lets 0 text blocks run"):
        text_config(tiny, {"heads": 4, "layers_used": 0})


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("unet", "model_channels", 64, "unet.model_channels: config 64, tensors 32"),
        ("unet", "channel_mult", [1, 2, 4], "channel_mult"),
        ("unet", "attention_resolutions", [8, 4], "attention_resolutions"),
        ("unet", "attention_resolutions", ["a", 1, 2], "attention_resolutions"),
        ("unet", "use_linear_in_transformer", False, "use_linear_in_transformer"),
        ("unet", "num_head_channels", 24, "does not divide 32, 64, 128"),
        ("unet", "num_head_channels", "16", "does not divide"),
        ("unet", "disable_self_attentions", [True], "the UNet has 4 levels"),
        ("unet", "disable_self_attentions", True, "the UNet has 4 levels"),
        ("unet", "disable_self_attentions", [True] * 4, "level 0 is the other way"),
        ("vae", "ch", 128, "vae.ch: config 128, tensors 32"),
        ("vae", "attn_resolutions", [16], "attn_resolutions"),
        ("text", "width", 1024, "text.width"),
        ("text", "heads", 5, "does not divide 64"),
    ],
)
def test_a_config_of_another_model_is_refused(keys, part, name, value, message):
    want, shapes = keys("base", "tiny")
    with pytest.raises(BadConfig, match=message) as caught:
        all_configs(shapes, {**want, part: {**want[part], name: value}})
    assert "config that belongs to this model" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.token_embedding.weight",
    ],
)
def test_a_tensor_that_gives_the_sizes_is_missing(keys, name):
    want, shapes = keys("base", "tiny")
    with pytest.raises(TensorMismatch, match=name.replace(".", r"\.")) as caught:
        all_configs({n: s for n, s in shapes.items() if n != name}, want)
    assert "incomplete" in caught.value.hint


@pytest.mark.parametrize("prefix", ["first_stage_model.", "cond_stage_model."])
def test_a_whole_network_is_missing(keys, prefix):
    want, shapes = keys("base", "tiny")
    with pytest.raises(TensorMismatch, match=prefix):
        all_configs({n: s for n, s in shapes.items() if not n.startswith(prefix)}, want)


OTHERS = {
    "Stable Diffusion 1.x": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
    "Stable Diffusion 1.x (UNet alone)": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)
    },
    "Stable Diffusion XL": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    },
    "a model in the layout of Stability's generative-models": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "conditioner.embedders.0.model.ln_final.weight": (1024,),
    },
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1, 1)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 320)},
    "a LoRA (peft)": {"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 320)},
    "a LoRA of a base model": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": (),
    },
    "a ControlNet": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
    "a ControlNet (diffusers)": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "a textual inversion": {"emb_params": (2, 1024)},
    "one part of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "a VAE alone": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "a VAE alone (bare)": {"decoder.up.0.block.0.conv1.weight": (128, 128, 3, 3)},
    "the averaged copy of a model": {"model_ema.diffusion_modelout2weight": (4, 320, 3, 3)},
    "no Stable Diffusion model": {"bert.encoder.layer.0.weight": (1,)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_named(case):
    what = case.split(" (")[0].removesuffix(" of a base model")
    with pytest.raises(NotACheckpoint) as caught:
        refuse_others("model.safetensors", OTHERS[case])
    assert f"looks like {what}" in caught.value.message
    assert "expected a Stable Diffusion 2.x model: model.diffusion_model.*" in caught.value.message
    assert "2.0 and 2.1" in caught.value.hint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_the_six_are_not_taken_for_others(keys, variant, scale):
    refuse_others("model.safetensors", keys(variant, scale)[1])


def test_unclip_without_its_image_tower(keys):
    """At full size the class vector tells; a small one has to be stated."""
    for scale in ("full", "tiny"):
        _, shapes = keys("unclip-l", scale)
        shapes = {n: s for n, s in shapes.items() if not n.startswith("embedder.")}
        if scale == "full":
            assert find_variant(shapes, None) == "unclip-l"
            continue
        assert find_variant(shapes, "unclip-h") == "unclip-h"
        with pytest.raises(UnknownFact, match="unclip-h or unclip-l") as caught:
            find_variant(shapes, None)
        assert '"variant"' in caught.value.hint


@pytest.mark.parametrize(("channels", "shown"), [(8, "8 input channels"), (7, "no class input")])
def test_unknown_input_channels(keys, channels, shown):
    _, shapes = keys("base", "tiny")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (32, channels, 3, 3)
    with pytest.raises(NotACheckpoint, match=shown) as caught:
        find_variant(shapes, None)
    assert "not supported" in caught.value.hint
