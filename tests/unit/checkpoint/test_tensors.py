"""Averaged weights, tolerated extras, and the list of all that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine.errors import TensorMismatch
from sdengine.export.checkpoint import open_checkpoint

pytestmark = pytest.mark.export

UNET = "model.diffusion_model."
OUT = UNET + "out.2.weight"


def add_average(arrays):
    """A full averaged copy, as training writes it: dots removed, values told apart."""
    for name in [n for n in arrays if n.startswith("model.")]:
        copy = "model_ema." + name[len("model.") :].replace(".", "")
        arrays[copy] = arrays[name] + np.float16(1)
    arrays["model_ema.decay"] = np.array(0.9999, np.float32)
    arrays["model_ema.num_updates"] = np.array(10_000, np.int32)


def test_averaged_weights_are_preferred(edited, base_arrays):
    path = edited(add_average)
    checkpoint = open_checkpoint(path)
    assert checkpoint.facts.source.weights == "ema"
    for name, ref in checkpoint.tensors.items():
        want = base_arrays[name] + np.float16(1) if name.startswith(UNET) else base_arrays[name]
        assert np.array_equal(ref.torch().numpy(), want), name
        assert ref.name == name


def test_averaged_weights_can_be_declined(edited, base_arrays):
    checkpoint = open_checkpoint(edited(add_average), ema=False)
    assert checkpoint.facts.source.weights == "plain"
    assert np.array_equal(checkpoint.tensors[OUT].torch().numpy(), base_arrays[OUT])


def test_two_counters_are_no_average(edited, base_arrays):
    """Files that hold the averaged weights as their only ones keep these two."""

    def edit(arrays):
        arrays["model_ema.decay"] = np.array(0.9999, np.float32)
        arrays["model_ema.num_updates"] = np.array(10_000, np.int32)

    checkpoint = open_checkpoint(edited(edit))
    assert checkpoint.facts.source.weights == "plain"
    assert np.array_equal(checkpoint.tensors[OUT].torch().numpy(), base_arrays[OUT])


def test_a_hole_in_the_average_is_an_error(edited):
    def edit(arrays):
        add_average(arrays)
        del arrays["model_ema.diffusion_modelinput_blocks10in_layers2weight"]

    with pytest.raises(
        TensorMismatch, match=r"1 missing: .*input_blocks\.1\.0\.in_layers\.2\.weight"
    ):
        open_checkpoint(edited(edit))


def test_known_extras_are_tolerated(edited, base):
    def edit(arrays):
        one = np.ones(2, np.float32)
        for name in (
            "lvlb_weights",
            "logvar",
            "cond_stage_model.model.attn_mask",
            "first_stage_model.loss.discriminator.main.0.weight",
            "first_stage_model.loss.perceptual_loss.net.slice1.0.bias",
            "optimizer_states.0.state.exp_avg",
            "lr_schedulers.0.last_epoch",
        ):
            arrays[name] = one

    assert list(open_checkpoint(edited(edit)).tensors) == list(open_checkpoint(base).tensors)


def test_missing_unexpected_and_wrong_tensors_are_listed(edited):
    """All kinds in one message, so that one look is enough."""

    def edit(arrays):
        del arrays[UNET + "time_embed.2.bias"]
        del arrays["first_stage_model.decoder.norm_out.weight"]
        arrays[UNET + "adapter.weight"] = np.ones(3, np.float16)
        arrays["cond_stage_model.model.ln_final.bias"] = np.ones(63, np.float16)
        arrays["first_stage_model.decoder.norm_out.bias"] = np.ones(32, np.int64)

    with pytest.raises(TensorMismatch) as caught:
        open_checkpoint(edited(edit))
    message = caught.value.message
    assert "2 missing: " in message
    assert "time_embed.2.bias" in message
    assert "first_stage_model.decoder.norm_out.weight" in message
    assert "1 unexpected: model.diffusion_model.adapter.weight" in message
    assert "1 of another shape: cond_stage_model.model.ln_final.bias [63], expected [64]" in message
    assert "1 of another type: first_stage_model.decoder.norm_out.bias I64" in message
    assert "float16, bfloat16 or float32" in caught.value.hint


def test_long_lists_are_cut_and_counted(edited):
    def edit(arrays):
        for name in [n for n in arrays if n.startswith(UNET + "output_blocks.11.")]:
            del arrays[name]

    with pytest.raises(TensorMismatch, match=r"(\d+) missing: .* and (\d+) more") as caught:
        open_checkpoint(edited(edit))
    assert caught.value.message.count("output_blocks.11.") == 20
    # A residual block with a skip convolution has 12 tensors, a transformer 26.
    assert "38 missing" in caught.value.message
    assert "... and 18 more" in caught.value.message


@pytest.mark.parametrize(
    "name", ["low_scale_model.betas", "depth_model.model.a", "embedder.model.b"]
)
def test_another_variant_s_companion_is_unexpected(edited, name):
    with pytest.raises(TensorMismatch, match=f"1 unexpected: {name}"):
        open_checkpoint(edited(lambda arrays: arrays.update({name: np.ones(1, np.float32)})))


def test_companions_are_kept(make_checkpoint):
    tensors = open_checkpoint(make_checkpoint("x4-upscaler")).tensors
    assert sum(n.startswith("low_scale_model.") for n in tensors) == 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_weight_types(make_checkpoint, dtype):
    tensors = open_checkpoint(make_checkpoint("base", dtype=dtype)).tensors
    assert {t.dtype for t in tensors.values()} == {{"fp32": "F32", "bf16": "BF16"}[dtype]}


def test_networks_take_the_tensors(make_checkpoint):
    """Strictly, under the names without their prefix: what the exporter does next."""
    from sdengine.export.modules import text, unet, vae

    checkpoint = open_checkpoint(make_checkpoint("base"))
    configs = checkpoint.configs
    vae_config = vae.VAEConfig.from_ldm(configs["vae"])
    for prefix, modules in (
        (unet.PREFIX, [unet.UNet(unet.UNetConfig.from_ldm(configs["unet"]))]),
        (text.PREFIX, [text.TextEncoder(text.TextConfig.from_ldm(configs["text"]))]),
        (vae.PREFIX, [vae.VAEEncoder(vae_config), vae.VAEDecoder(vae_config)]),
    ):
        left = {n.removeprefix(prefix) for n in checkpoint.tensors if n.startswith(prefix)}
        for module in modules:
            names = list(module.state_dict())
            module.load_state_dict({n: checkpoint.tensors[prefix + n].torch() for n in names})
            left -= set(names)
        assert not left
