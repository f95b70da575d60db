"""Diffusers folders: the same numbers come out of our networks as out of diffusers' own.

Reference: UNet2DConditionModel and AutoencoderKL of diffusers, CLIPTextModel of transformers,
small and random, saved by their own `save_pretrained`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdengine.engine.errors import BadConfig, NotACheckpoint, TensorMismatch, UnsafeCheckpoint
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.modules import depth, image_encoder, text, unet, vae

with warnings.catch_warnings():  # their own deprecations are none of ours
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers", reason="the reference of these tests")
    transformers = pytest.importorskip("transformers", reason="the reference of these tests")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        DPTConfig,
        DPTForDepthEstimation,
    )

pytestmark = pytest.mark.export

TOLERANCE = (
    1e-4  # two float32 implementations of one network; a misplaced tensor gives 0.1 and more
)
WIDTH = 64  # of the text tower
VOCABULARY = 600

SD2 = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (2, 4, 8, 8),  # the number of heads
}
X4 = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "attention_head_dim": 8,
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
    "block_out_channels": (32, 64, 64, 128),
}
PROJECTION = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48}
UNETS = {
    "base": {"in_channels": 4, **SD2},
    "inpainting": {"in_channels": 9, **SD2},
    "depth": {"in_channels": 5, **SD2},
    "x4-upscaler": {"in_channels": 7, **X4},
    "unclip-l": {"in_channels": 4, **SD2, **PROJECTION},
}
PIPELINES = {
    "base": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
    "unclip-l": "StableUnCLIPImg2ImgPipeline",
}


def small_unet(variant, layers=2):
    torch.manual_seed(1)
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "out_channels": 4,
            "block_out_channels": (32, 64, 128, 128),
            "layers_per_block": layers,
            "cross_attention_dim": WIDTH,
            "use_linear_projection": True,
            **UNETS[variant],
        }
    ).eval()


def small_vae(levels=4):
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 64, 96, 128)[:levels],
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215 if levels == 4 else 0.08333,
    ).eval()


def small_text():
    torch.manual_seed(3)
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=598,
        eos_token_id=599,
    )
    model = CLIPTextModel(config).eval()
    for p in model.parameters():  # biases and norms too: nothing stays at 0 or 1
        torch.nn.init.normal_(p, std=0.1)
    return model


def randomised(model):
    """Biases and norms too: nothing stays at 0 or 1."""
    for p in model.parameters():
        fan = p[0].numel() if p.ndim > 1 else 1
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1 if p.ndim == 1 else fan**-0.5)
    return model.eval()


def small_depth():
    """The published network's shape, narrow; the other values are its config's."""
    torch.manual_seed(8)
    config = DPTConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=192,
        is_hybrid=True,
        backbone_config={
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "depths": [3, 4, 9],
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
            "hidden_sizes": [128, 128, 128],
            "embedding_size": 32,
        },
        neck_hidden_sizes=[128, 128, 48, 48],
        neck_ignore_stages=[0, 1],
        fusion_hidden_size=32,
        reassemble_factors=[1, 1, 1, 0.5],
        backbone_featmap_shape=[1, 128, 24, 24],
    )
    return randomised(DPTForDepthEstimation(config))


def small_tower():
    torch.manual_seed(9)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=24,
        hidden_act="quick_gelu",
    )
    return randomised(CLIPVisionModelWithProjection(config))


def small_normalizer():
    torch.manual_seed(10)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=24)
    torch.nn.init.normal_(normalizer.mean)
    torch.nn.init.uniform_(normalizer.std, 0.5, 2)
    return normalizer


COMPANIONS = {
    "depth": {"depth_estimator": small_depth},
    "unclip-l": {"image_encoder": small_tower, "image_normalizer": small_normalizer},
}
FURTHER = {
    "x4-upscaler": {
        "low_res_scheduler": {
            "_class_name": "DDPMScheduler",
            "beta_start": 0.0002,
            "beta_end": 0.03,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
        }
    },
    "unclip-l": {
        "image_noising_scheduler": {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "num_train_timesteps": 1000,
        }
    },
}


def scheduler(variant):
    v = variant in ("x4-upscaler", "unclip-l")
    start, end = (0.0001, 0.02) if variant == "x4-upscaler" else (0.00085, 0.012)
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
        "trained_betas": None,
    }


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(variant) -> (folder, unet, vae, text)`, written once."""
    made = {}

    def make(variant="base"):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            models = (
                small_unet(variant),
                small_vae(3 if variant == "x4-upscaler" else 4),
                small_text(),
            )
            for name, model in zip(("unet", "vae", "text_encoder"), models, strict=True):
                model.save_pretrained(folder / name)
            for name, make in COMPANIONS.get(variant, {}).items():
                make().save_pretrained(folder / name)
            for name, value in FURTHER.get(variant, {}).items():
                write(folder / name / "scheduler_config.json", value)
            index = {"_class_name": PIPELINES[variant]}
            if variant == "x4-upscaler":
                index["max_noise_level"] = 300
            if variant == "unclip-l":  # 24 + 24 entries are of neither published model
                write(folder / "variant.json", {"prediction": "v", "variant": variant})
            write(folder / "model_index.json", index)
            write(folder / "scheduler" / "scheduler_config.json", scheduler(variant))
            write(folder / "tokenizer" / "tokenizer_config.json", {"pad_token": "!"})
            write(folder / "tokenizer" / "vocab.json", {"!": 0, '"': 1})
            made[variant] = (folder, *models)
        return made[variant]

    return make


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the base folder, to be changed."""
    return Path(shutil.copytree(saved("base")[0], tmp_path / "model"))


def ours(checkpoint, module, prefix):
    names = module.state_dict()
    module.load_state_dict({n: checkpoint.tensors[prefix + n].torch().float() for n in names})
    return module.eval()


def opened(folder):
    config = folder / "variant.json"
    return open_checkpoint(folder, config=config if config.is_file() else None)


def our_unet(checkpoint):
    config = unet.UNetConfig.from_ldm(checkpoint.configs["unet"])
    return ours(checkpoint, unet.UNet(config), unet.PREFIX)


@pytest.mark.parametrize("variant", UNETS)
@torch.inference_mode()
def test_unet_gives_diffusers_numbers(saved, variant):
    folder, reference, _, _ = saved(variant)
    checkpoint = opened(folder)
    assert checkpoint.facts.variant == variant
    torch.manual_seed(4)
    x = torch.randn(2, UNETS[variant]["in_channels"], 16, 24)
    t = torch.tensor([981.0, 3.0])
    context = torch.randn(2, 77, WIDTH)
    label = {"x4-upscaler": torch.tensor([20, 350]), "unclip-l": torch.randn(2, 48)}.get(variant)
    want = reference(x, t, context, class_labels=label).sample
    found = our_unet(checkpoint)(x, t, context, label)
    assert (found - want).abs().max() < TOLERANCE
    assert want.std() > 0.1


@torch.inference_mode()
def test_one_layer_a_level(copied):
    """The block numbers depend on the layers of a level."""
    reference = small_unet("base", layers=1)
    shutil.rmtree(copied / "unet")
    reference.save_pretrained(copied / "unet")
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, WIDTH)
    found = our_unet(open_checkpoint(copied))(x, t, context)
    assert (found - reference(x, t, context).sample).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["base", "x4-upscaler"])
@torch.inference_mode()
def test_vae_gives_diffusers_numbers(saved, variant):
    folder, _, reference, _ = saved(variant)
    checkpoint = open_checkpoint(folder)
    config = vae.VAEConfig.from_ldm(checkpoint.configs["vae"])
    torch.manual_seed(5)
    image, latent = torch.rand(1, 3, 64, 96) * 2 - 1, torch.randn(1, 4, 8, 12)
    moments = ours(checkpoint, vae.VAEEncoder(config), vae.PREFIX)(image)
    assert (moments - reference.encode(image).latent_dist.parameters).abs().max() < TOLERANCE
    decoded = ours(checkpoint, vae.VAEDecoder(config), vae.PREFIX)(latent)
    assert (decoded - reference.decode(latent).sample).abs().max() < TOLERANCE


@torch.inference_mode()
def test_text_tower_gives_transformers_numbers(saved):
    folder, _, _, reference = saved("base")
    checkpoint = open_checkpoint(folder)
    config = text.TextConfig.from_ldm(checkpoint.configs["text"])
    assert (config.layers, config.heads) == (3, 4)
    torch.manual_seed(6)
    ids = torch.randint(0, VOCABULARY, (2, 77))
    found = ours(checkpoint, text.TextEncoder(config), text.PREFIX)(ids)
    want = reference(ids).last_hidden_state
    assert (found - want).abs().max() < TOLERANCE
    assert want.std() > 0.1


@pytest.mark.parametrize("variant", UNETS)
def test_facts_of_the_folder(saved, variant):
    folder = saved(variant)[0]
    checkpoint = opened(folder)
    facts = checkpoint.facts
    assert checkpoint.kind == facts.source.kind == "diffusers"
    assert facts.name == facts.source.file == folder.name
    assert facts.prediction == ("v" if variant in ("x4-upscaler", "unclip-l") else "eps")
    assert str(folder) in checkpoint.decided["prediction"]
    x4 = variant == "x4-upscaler"
    assert facts.latent.scale == (0.08333 if x4 else 0.18215)
    assert facts.latent.factor == (4 if x4 else 8)
    assert facts.native_size == ((64, 64) if x4 else (128, 128))  # sample_size 16
    want = (0.0001, 0.02) if x4 else (0.00085, 0.012)
    assert (facts.schedule.beta_start, facts.schedule.beta_end) == want
    t = facts.tokenizer
    assert (t.start, t.end, t.pad, t.length) == (598, 599, 0, 77)


# -- what a variant has beside ---------------------------------------------------------------


@torch.inference_mode()
def test_depth_network_gives_transformers_numbers(saved):
    folder = saved("depth")[0]
    checkpoint = opened(folder)
    config = depth.DepthConfig.from_dict(checkpoint.configs["depth"])
    assert (config.heads, config.stages) == (3, (3, 4, 9))
    reference = DPTForDepthEstimation.from_pretrained(folder / "depth_estimator")
    image = torch.rand(2, 3, 384, 384, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = ours(checkpoint, depth.DepthNetwork(config), depth.PREFIX)(image)
    want = reference(image).predicted_depth
    assert want.std() > 0.1
    assert (found - want).abs().max() < TOLERANCE * want.abs().max()


@torch.inference_mode()
def test_image_tower_gives_transformers_numbers(saved):
    folder = saved("unclip-l")[0]
    checkpoint = opened(folder)
    config = image_encoder.ImageConfig.from_dict(checkpoint.configs["image_encoder"])
    assert (config.heads, config.activation) == (4, "quick_gelu")
    reference = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    found = ours(checkpoint, image_encoder.ImageEncoder(config), image_encoder.PREFIX)(pixels)
    assert (found - reference(pixels).image_embeds).abs().max() < TOLERANCE


def test_facts_of_the_companions(saved):
    low = opened(saved("x4-upscaler")[0]).facts.low_scale
    assert (low.schedule.beta_start, low.schedule.beta_end) == (0.0002, 0.03)
    assert low.max_level == 300
    checkpoint = opened(saved("unclip-l")[0])
    image = checkpoint.facts.image_conditioning
    assert (image.size, image.embedding, image.statistics) == (56, 24, True)
    assert (image.noise.kind, image.noise.timesteps) == ("squaredcos_cap_v2", 1000)
    normalizer = small_normalizer()
    for name, want in (("data_mean", normalizer.mean), ("data_std", normalizer.std)):
        found = checkpoint.tensors[f"noise_augmentor.{name}"]
        assert (found.dtype, found.shape) == ("F32", (24,))
        assert torch.equal(found.torch(), want.detach()[0])


def test_a_folder_without_its_depth_network(saved, tmp_path):
    """A depth map can be given to the run instead."""
    folder = Path(shutil.copytree(saved("depth")[0], tmp_path / "model"))
    shutil.rmtree(folder / "depth_estimator")
    assert "depth" not in opened(folder).configs


def test_a_folder_without_its_image_tower(saved, tmp_path):
    folder = Path(shutil.copytree(saved("unclip-l")[0], tmp_path / "model"))
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(TensorMismatch, match="no image tower") as caught:
        opened(folder)
    assert "StableUnCLIPImg2ImgPipeline" in caught.value.hint


@pytest.mark.parametrize(
    ("variant", "component", "name", "value"),
    [
        ("depth", "depth_estimator", "is_hybrid", False),
        ("depth", "depth_estimator", "readout_type", "add"),
        ("unclip-l", "image_encoder", "hidden_act", "relu"),
        ("unclip-l", "image_noising_scheduler", "beta_schedule", "linear"),
        ("x4-upscaler", "low_res_scheduler", "beta_schedule", "linear"),
    ],
)
def test_a_companion_of_another_kind(saved, tmp_path, variant, component, name, value):
    folder = Path(shutil.copytree(saved(variant)[0], tmp_path / "model"))
    (file,) = (folder / component).glob("*config.json")
    write(file, json.loads(file.read_text()) | {name: value})
    with pytest.raises(BadConfig, match=f"{component}: {name} is '{value}'"):
        opened(folder)


# -- the forms that a folder comes in ----------------------------------------------------------


def contents(checkpoint):
    return {n: bytes(t.numpy_bytes()) for n, t in checkpoint.tensors.items()}


def with_and_without_text_model(path, wrapped):
    file = path / "text_encoder" / "model.safetensors"
    state = {n.removeprefix("text_model."): t for n, t in load_file(file).items()}
    state["embeddings.position_ids"] = torch.arange(77)[None]
    save_file({("text_model." if wrapped else "") + n: t for n, t in state.items()}, file)


@pytest.mark.parametrize("wrapped", [True, False])
def test_both_spellings_of_the_text_tower(saved, copied, wrapped):
    with_and_without_text_model(copied, wrapped)
    assert contents(open_checkpoint(copied)) == contents(open_checkpoint(saved("base")[0]))


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_old_names_of_the_vae_s_attention(saved, copied):
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        for new, old in OLD.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        state[name] = tensor
    assert any(".proj_attn." in n for n in state)
    save_file(state, file)
    assert contents(open_checkpoint(copied)) == contents(open_checkpoint(saved("base")[0]))


def to_bin(folder, stem, torch_stem):
    file = folder / f"{stem}.safetensors"
    torch.save(load_file(file), folder / f"{torch_stem}.bin")
    file.unlink()


def test_bin_files(saved, copied):
    to_bin(copied / "unet", "diffusion_pytorch_model", "diffusion_pytorch_model")
    to_bin(copied / "vae", "diffusion_pytorch_model", "diffusion_pytorch_model")
    to_bin(copied / "text_encoder", "model", "pytorch_model")
    assert contents(open_checkpoint(copied)) == contents(open_checkpoint(saved("base")[0]))


def test_a_hostile_bin_file_is_refused(copied, tmp_path):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'it_ran')!r}, 'w').close()",)

    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Hostile()}, copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint):
        open_checkpoint(copied)
    assert not (tmp_path / "it_ran").exists()


def test_half_precision_variant(saved, copied):
    """Written by diffusers itself; taken where the full one is not there."""
    network = saved("base")[1]
    half = small_unet("base").half()
    half.save_pretrained(copied / "unet", variant="fp16")
    assert {t.dtype for t in open_checkpoint(copied).tensors.values()} == {"F32"}
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tensors = open_checkpoint(copied).tensors
    assert tensors[unet.PREFIX + "out.2.weight"].dtype == "F16"
    assert torch.equal(
        tensors[unet.PREFIX + "out.2.weight"].torch(), network.conv_out.weight.half()
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_sharded_files(saved, copied, variant, safe):
    """Written by diffusers itself."""
    shutil.rmtree(copied / "unet")
    network = small_unet("base")
    options = {"max_shard_size": "2MB", "safe_serialization": safe, "variant": variant}
    network.save_pretrained(copied / "unet", **options)
    assert len(list((copied / "unet").glob("*-of-*"))) > 2
    assert list((copied / "unet").glob("*index*"))
    assert contents(open_checkpoint(copied)) == contents(open_checkpoint(saved("base")[0]))


def test_sharded_text_tower(saved, copied):
    """Written by transformers itself."""
    shutil.rmtree(copied / "text_encoder")
    small_text().save_pretrained(copied / "text_encoder", max_shard_size="200KB")
    assert (copied / "text_encoder" / "model.safetensors.index.json").is_file()
    assert contents(open_checkpoint(copied)) == contents(open_checkpoint(saved("base")[0]))


def test_weights_before_averaging(saved, copied):
    network = small_unet("base")
    torch.nn.init.ones_(network.conv_out.bias)
    network.save_pretrained(copied / "unet", variant="non_ema")
    name = unet.PREFIX + "out.2.bias"
    assert open_checkpoint(copied, ema=False).tensors[name].torch().tolist() == [1.0] * 4
    assert open_checkpoint(copied).tensors[name].torch().tolist() != [1.0] * 4


# -- what is refused ---------------------------------------------------------------------------


def change(path, **values):
    write(path, {**json.loads(path.read_text()), **values})


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusionControlNetPipeline", "FluxPipeline", None]
)
def test_other_pipelines(copied, name):
    change(copied / "model_index.json", _class_name=name)
    with pytest.raises(NotACheckpoint, match=f"diffusers folder for {name}") as caught:
        open_checkpoint(copied)
    assert "StableDiffusionPipeline" in caught.value.hint


def test_stable_diffusion_1(copied):
    change(copied / "unet" / "config.json", cross_attention_dim=768)
    with pytest.raises(NotACheckpoint, match=r"looks like Stable Diffusion 1\.x") as caught:
        open_checkpoint(copied)
    assert "2.0 and 2.1" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("unet/config.json", {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps"),
        ("unet/config.json", {"attention_head_dim": [2, 4, 8]}, "attention_head_dim"),
        ("unet/config.json", {"attention_head_dim": [2, 4, 8, 16]}, "equal heads"),
        ("unet/config.json", {"attention_head_dim": "8"}, "attention_head_dim"),
        ("vae/config.json", {"norm_num_groups": 16}, "norm_num_groups"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("vae/config.json", {"scaling_factor": "big"}, "scaling_factor"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_configs_of_other_networks(copied, file, values, message):
    change(copied / file, **values)
    with pytest.raises(BadConfig, match=message) as caught:
        open_checkpoint(copied)
    assert str(copied / Path(file).parent) in caught.value.message
    assert caught.value.hint


def test_prediction_types(copied):
    """`velocity` is the first upload's word; without a word diffusers takes epsilon."""
    path = copied / "scheduler" / "scheduler_config.json"
    change(path, prediction_type="velocity")
    assert open_checkpoint(copied).facts.prediction == "v"
    assert open_checkpoint(copied, prediction="eps").facts.prediction == "eps"
    document = json.loads(path.read_text())
    del document["prediction_type"]
    write(path, document)
    assert open_checkpoint(copied).facts.prediction == "eps"


def test_vae_without_a_scale_has_diffusers_default(copied):
    path = copied / "vae" / "config.json"
    write(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "scaling_factor"})
    assert open_checkpoint(copied).facts.latent.scale == 0.18215


def test_pad_id_and_licence(copied):
    change(copied / "tokenizer" / "tokenizer_config.json", pad_token={"content": '"'})
    (copied / "README.md").write_text("---\nlicense: openrail++\ntags: [a]\n---\n# Card\n")
    facts = open_checkpoint(copied).facts
    assert facts.tokenizer.pad == 1
    assert facts.licence == "openrail++"
    shutil.rmtree(copied / "tokenizer")
    assert open_checkpoint(copied).facts.tokenizer.pad == 0


def test_missing_and_unexpected_tensors(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_norm_out.weight"]
    state["time_embedding.cond_proj.weight"] = torch.ones(2)
    save_file(state, file)
    with pytest.raises(TensorMismatch) as caught:
        open_checkpoint(copied)
    assert "1 missing: model.diffusion_model.out.0.weight" in caught.value.message
    assert "1 unexpected: unet: time_embedding.cond_proj.weight" in caught.value.message


def test_a_torn_q_k_v(copied):
    file = copied / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith("layers.1.self_attn.k_proj.weight"))
    del state[name]
    save_file(state, file)
    with pytest.raises(TensorMismatch) as caught:
        open_checkpoint(copied)
    assert "resblocks.1.attn.in_proj_weight" in caught.value.message
    assert "2 unexpected: text_encoder: encoder.layers.1.self_attn." in caught.value.message


@pytest.mark.parametrize(
    ("remove", "message", "hint"),
    [
        ("vae", "has no folder vae", "unet, vae, text_encoder"),
        ("unet/diffusion_pytorch_model.safetensors", "has no weights", "git lfs pull"),
        ("unet/config.json", "config.json is not there", "incomplete"),
        ("scheduler", "scheduler_config.json is not there", "incomplete"),
    ],
)
def test_missing_parts(copied, remove, message, hint):
    path = copied / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(NotACheckpoint, match=message) as caught:
        open_checkpoint(copied)
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1'])
def test_damaged_json(copied, text):
    (copied / "vae" / "config.json").write_text(text)
    with pytest.raises(NotACheckpoint, match=r"vae/config\.json is") as caught:
        open_checkpoint(copied)
    assert "fetch the folder again" in caught.value.hint


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "not a file of its own folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a file of its own folder"),
        ({"weight_map": {"a": 5}}, "not a file of its own folder"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "does not exist"),
        ({"weight_map": {"a": "other.safetensors"}}, "lacks 'a'"),
    ],
)
def test_bad_shard_indexes(copied, index, message):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_file({"b": torch.ones(1)}, copied / "unet" / "other.safetensors")
    write(copied / "unet" / "diffusion_pytorch_model.safetensors.index.json", index)
    with pytest.raises(NotACheckpoint, match=message) as caught:
        open_checkpoint(copied)
    assert caught.value.hint
