"""What is stated beside the tensors, who is believed first, and the facts that come out."""

from __future__ import annotations

import json
import logging
from functools import partial

import numpy as np
import pytest
import torch

from sdengine.engine.errors import BadConfig, UnknownFact, UnknownName
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.modules.text import TextConfig
from sdengine.export.modules.unet import PREFIX, UNet, UNetConfig
from sdengine.export.modules.vae import VAEConfig
from sdengine.export.probe import probe

pytestmark = pytest.mark.export

UNET = "model.diffusion_model."
# As the reference's own files have it, white space and all.
V2_INFERENCE_V = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 96
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: True
        use_fp16: True
        image_size: 32 # unused
        in_channels: 4
        out_channels: 4
        model_channels: 32
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_head_channels: 16 # need to fix for flash-attn
        use_spatial_transformer: True
        use_linear_in_transformer: True
        transformer_depth: 1
        context_dim: 64
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 32
          ch_mult:
          - 1
          - 2
          - 4
          - 4
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params:
        freeze: True
        layer: "penultimate"
        heads: 4
"""


def written(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def params(document):
    return document["model"]["params"]


# -- configs -----------------------------------------------------------------------------------


def test_the_reference_s_own_yaml(base, tmp_path):
    facts = open_checkpoint(base, config=written(tmp_path / "v.yaml", V2_INFERENCE_V)).facts
    assert facts.prediction == "v"
    assert facts.native_size == (768, 768)
    assert (facts.schedule.beta_start, facts.schedule.beta_end) == (0.00085, 0.012)
    assert facts.schedule.timesteps == 1000
    assert facts.latent.scale == 0.18215
    assert (facts.latent.channels, facts.latent.factor, facts.latent.multiple) == (4, 8, 8)
    t = facts.tokenizer
    assert (t.start, t.end, t.pad, t.length) == (49406, 49407, 0, 77)
    assert facts.variant == "base"
    assert facts.name == base.stem
    assert facts.source.file == base.name
    assert "not stated" in facts.licence


@pytest.mark.parametrize(
    ("variant", "scale", "factor", "multiple", "native", "betas"),
    [
        ("base", 0.18215, 8, 8, 512, (0.00085, 0.012)),
        ("inpainting", 0.18215, 8, 8, 512, (0.00085, 0.012)),
        ("depth", 0.18215, 8, 8, 512, (0.00085, 0.012)),
        ("x4-upscaler", 0.08333, 4, 8, 512, (0.0001, 0.02)),
        ("unclip-h", 0.18215, 8, 8, 768, (0.00085, 0.012)),
        ("unclip-l", 0.18215, 8, 8, 768, (0.00085, 0.012)),
    ],
)
def test_facts_of_every_variant(
    make_checkpoint,
    golden_file,
    embedding_stats,
    tmp_path,
    variant,
    scale,
    factor,
    multiple,
    native,
    betas,
):
    """The table of the reference's variants; a JSON that states heads alone leaves them to us."""
    document = json.loads(golden_file(f"keys/{variant}.tiny.json").read_text())
    config = document["config"]
    heads = {k: v for k, v in config["unet"].items() if k.startswith("num_head")}
    if "disable_self_attentions" in config["unet"]:
        heads["disable_self_attentions"] = config["unet"]["disable_self_attentions"]
    stated = {"unet": heads, "text": {"heads": config["text"]["heads"]}}
    path = make_checkpoint(variant)
    opened = partial(
        open_checkpoint, path, embedding_stats=embedding_stats if variant == "unclip-l" else None
    )
    sparse = opened(config=written(tmp_path / "heads.json", stated))
    full = opened(config=golden_file(f"keys/{variant}.tiny.json"))
    beside = opened()
    for checkpoint in (sparse, full, beside):
        facts = checkpoint.facts
        assert facts.variant == variant
        assert facts.prediction == config["prediction"]
        assert facts.latent.scale == scale
        assert (facts.latent.factor, facts.latent.multiple) == (factor, multiple)
        assert facts.native_size == (native, native)
        assert (facts.schedule.beta_start, facts.schedule.beta_end) == betas
        assert networks(checkpoint) == networks(beside)


def networks(checkpoint):
    configs = checkpoint.configs
    return (
        UNetConfig.from_ldm(configs["unet"]),
        VAEConfig.from_ldm(configs["vae"]),
        TextConfig.from_ldm(configs["text"]),
    )


def test_a_small_model_s_own_size(base, sidecar, tmp_path):
    params(sidecar)["image_size"] = 16
    facts = open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar)).facts
    assert facts.native_size == (128, 128)


def test_yaml_spells_small_numbers_as_text(base, tmp_path):
    """YAML 1.1 has no number without a point: PyYAML gives 85e-5 as a text."""
    text = V2_INFERENCE_V.replace("linear_start: 0.00085", "linear_start: 85e-5")
    facts = open_checkpoint(base, config=written(tmp_path / "v.yaml", text)).facts
    assert facts.schedule.beta_start == 0.00085


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("model: [unclosed", "not sound YAML"),
        ("", "holds no facts"),
        ("just a text", "holds no facts"),
        ("a: 1", "states none of unet, vae, text, prediction"),
        ("model:\n  params:\n    linear_start: 1", "unet_config.params"),
        ("model:\n  params: 7", "params is '7', expected an object"),
        ("!!python/object/apply:os.system ['touch it_ran']", "not sound YAML"),
        ("prediction: x0", "prediction is 'x0', expected eps or"),
        ("prediction: [v]", "prediction is"),
        ("unet: 5", "unet is '5', expected an object"),
        ("{prediction: v, scale_factor: many}", "scale_factor is 'many', expected a number"),
        ("{prediction: v, scale_factor: true}", "scale_factor is 'True', expected a number"),
        ("{prediction: v, scale_factor: .nan}", "scale_factor is 'nan', expected a number"),
        ("{prediction: v, timesteps: 1.5}", "timesteps is '1.5', expected a whole number"),
        ("{prediction: v, timesteps: -1}", "timesteps is '-1', expected a whole number"),
        ("{prediction: v, beta_schedule: cosine}", "beta_schedule is 'cosine'"),
        ("{prediction: v, text: {layer: third}}", "layer is 'third'"),
        ("{prediction: v, licence: 5}", "licence is '5', expected a text"),
    ],
)
def test_bad_configs_are_refused(base, tmp_path, monkeypatch, document, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfig, match=message.replace("(", r"\(").replace("[", r"\[")) as caught:
        open_checkpoint(base, config=written(tmp_path / "bad.yaml", document))
    assert "LDM yaml" in caught.value.hint
    assert "bad.yaml" in caught.value.message
    assert not (tmp_path / "it_ran").exists()


def test_config_file_troubles(base, tmp_path):
    with pytest.raises(BadConfig, match="does not exist") as caught:
        open_checkpoint(base, config=tmp_path / "none.yaml")
    assert "check the path" in caught.value.hint
    (tmp_path / "latin.yaml").write_bytes(b"licence: caf\xe9")
    with pytest.raises(BadConfig, match="not sound YAML"):
        open_checkpoint(base, config=tmp_path / "latin.yaml")
    with pytest.raises(BadConfig, match="not sound JSON"):
        open_checkpoint(base, config=written(tmp_path / "a.json", "{'a': 1}"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_size", 0, "states pictures of 0 pixels"),
        ("image_size", 12, "states pictures of 96 pixels, expected a multiple of 64"),
        ("scale_factor", 0, "states a latent scale of 0"),
        ("scale_factor", -0.18215, "states a latent scale of -0.18215"),
        ("linear_start", 0, "expected 0 < start < end < 1"),
        ("linear_end", 1.5, "expected 0 < start < end < 1"),
        ("timesteps", 1, "expected 0 < start < end < 1"),
    ],
)
def test_facts_that_cannot_be(base, sidecar, tmp_path, name, value, message):
    params(sidecar)[name] = value
    with pytest.raises(BadConfig, match=message) as caught:
        open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))
    assert "--config" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_scale_shift_norm", True), ("resblock_updown", True), ("dims", 1)],
)
def test_networks_that_we_do_not_build(base, sidecar, tmp_path, name, value):
    params(sidecar)["unet_config"]["params"][name] = value
    with pytest.raises(BadConfig, match=name) as caught:
        open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))
    assert "another model family" in caught.value.hint


def test_another_activation_is_not_gelu(base, sidecar, tmp_path):
    params(sidecar)["cond_stage_config"]["params"]["activation"] = "quick_gelu"
    with pytest.raises(BadConfig, match="quick_gelu"):
        open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))


def test_licence_of_the_file_and_of_the_config(base, base_arrays, sidecar, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    save_file(dict(base_arrays), path, metadata={"modelspec.license": "CreativeML Open RAIL++-M"})
    written(path.with_suffix(".yaml"), sidecar)
    assert open_checkpoint(path).facts.licence == "CreativeML Open RAIL++-M"
    written(path.with_suffix(".yaml"), {**sidecar, "licence": "MIT"})
    assert open_checkpoint(path).facts.licence == "MIT"


# -- betas -------------------------------------------------------------------------------------


def test_the_file_s_own_betas_contradict_the_config(base, sidecar, tmp_path):
    params(sidecar)["linear_end"] = 0.02
    with pytest.raises(BadConfig) as caught:
        open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))
    assert "0.02" in caught.value.message
    assert "the file's own: 1000 from 0.00085 to 0.012" in caught.value.message
    assert "--config" in caught.value.hint


def without_betas(sidecar, path):
    for name in ("linear_start", "linear_end", "timesteps"):
        params(sidecar).pop(name)
    return written(path.with_suffix(".yaml"), sidecar)


def test_the_file_s_own_betas_are_taken_where_nothing_is_stated(edited, sidecar):
    betas = np.linspace(0.001**0.5, 0.015**0.5, 500) ** 2
    path = edited(lambda arrays: arrays.update(betas=betas.astype(np.float32)))
    without_betas(sidecar, path)
    schedule = open_checkpoint(path).facts.schedule
    assert (schedule.beta_start, schedule.beta_end, schedule.timesteps) == (0.001, 0.015, 500)


def test_half_precision_betas_are_no_contradiction(edited):
    path = edited(lambda arrays: arrays.update(betas=arrays["betas"].astype(np.float16)))
    assert open_checkpoint(path).facts.schedule.beta_start == 0.00085


def test_betas_of_another_law(edited, sidecar):
    """Zero terminal SNR: the last one is 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    betas[-1] = 1
    path = edited(lambda arrays: arrays.update(betas=betas.astype(np.float32)))
    without_betas(sidecar, path)
    with pytest.raises(UnknownFact, match="law that is not known") as caught:
        open_checkpoint(path)
    assert "zero-terminal-SNR" in caught.value.hint


# -- eps or v ----------------------------------------------------------------------------------


def set_answer(config: UNetConfig, answer: float) -> dict[str, torch.Tensor]:
    """A UNet that gives `answer` everywhere: its last convolution has zero weights."""
    torch.manual_seed(0)
    state = UNet(config).state_dict()
    state["out.2.weight"] = torch.zeros_like(state["out.2.weight"])
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], answer)
    return state


@pytest.mark.parametrize(
    ("answer", "want"), [(0.5, "eps"), (-0.4, "eps"), (-0.6, "v"), (-2.0, "v")]
)
def test_the_probe_s_threshold(answer, want):
    """mean(out - 0.5) < -1 means v: the answers lie on both sides of -0.5."""
    from sdengine.export.containers import TensorRef

    ldm = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [1, 2],
        "num_head_channels": 16,
        "context_dim": 48,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
    }
    state = set_answer(UNetConfig.from_ldm(ldm), answer)
    refs = {
        PREFIX + n: TensorRef(
            PREFIX + n, "F32", tuple(t.shape), lambda t=t: t.numpy().reshape(-1).view(np.uint8)
        )
        for n, t in state.items()
    }
    found, shift = probe(refs, ldm)
    assert found == want
    assert shift == pytest.approx(answer - 0.5, abs=1e-5)


@pytest.fixture
def answering(edited, sidecar, tmp_path):
    """`answering(value, stated)`: the small base model that answers the probe with `value`; its
    sidecar states the prediction or, with None, is a JSON config that is silent about it."""

    def make(value, stated):
        def edit(arrays):
            arrays[UNET + "out.2.weight"] = np.zeros_like(arrays[UNET + "out.2.weight"])
            arrays[UNET + "out.2.bias"] = np.full(4, value, np.float16)

        path = edited(edit)
        flat = {
            "unet": params(sidecar)["unet_config"]["params"],
            "text": params(sidecar)["cond_stage_config"]["params"],
        }
        if stated is not None:
            flat["prediction"] = stated
        written(path.with_suffix(".yaml"), flat)
        return path

    return make


@pytest.mark.parametrize(
    ("option", "stated", "value", "want", "by"),
    [
        ("eps", "v", -2, "eps", "the option"),
        ("v_prediction", "eps", 0, "v", "the option"),
        (None, "v", 0, "v", "edited.yaml"),
        (None, "velocity", 0, "v", "edited.yaml"),
        (None, "epsilon", -2, "eps", "edited.yaml"),
        (None, None, -2, "v", "the probe (mean of output - input -2.50"),
        (None, None, 0, "eps", "the probe (mean of output - input -0.50"),
    ],
)
def test_who_decides_eps_or_v(answering, caplog, option, stated, value, want, by):
    """The option, then what is stated, then the probe; the log names who it was."""
    path = answering(value, stated)
    with caplog.at_level(logging.INFO, logger="sdengine"):
        checkpoint = open_checkpoint(path, prediction=option)
    assert checkpoint.facts.prediction == want
    assert by in checkpoint.decided["prediction"]
    assert f"prediction {want}, decided by " in caplog.text
    assert by in caplog.text
    assert checkpoint.facts.native_size[0] == (768 if want == "v" else 512)


def test_a_scheduler_config_decides_too(answering, tmp_path):
    """diffusers' own file, given for a single-file model."""
    config = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
    }
    given = written(tmp_path / "scheduler_config.json", config)
    checkpoint = open_checkpoint(answering(0, "eps"), config=given)
    assert checkpoint.facts.prediction == "v"
    assert "scheduler_config.json" in checkpoint.decided["prediction"]


def test_an_ldm_yaml_without_a_word_means_eps(base, sidecar, tmp_path):
    del params(sidecar)["parameterization"]
    checkpoint = open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))
    assert checkpoint.facts.prediction == "eps"
    assert "a.yaml" in checkpoint.decided["prediction"]


def test_the_given_config_goes_over_the_one_beside(base, sidecar, tmp_path):
    params(sidecar)["parameterization"] = "v"
    assert open_checkpoint(base).facts.prediction == "eps"
    given = open_checkpoint(base, config=written(tmp_path / "a.yaml", sidecar))
    assert given.facts.prediction == "v"


def test_unknown_prediction(base):
    with pytest.raises(UnknownName, match="unknown prediction 'epsilom'") as caught:
        open_checkpoint(base, prediction="epsilom")
    assert "'epsilon'" in caught.value.hint
