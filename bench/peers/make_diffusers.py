"""A Stable Diffusion 2 checkpoint as a diffusers folder: `python make_diffusers.py CHECKPOINT OUT
[HEAD]`. Runs in the peer's environment and needs no network: diffusers' own conversion, with
configs written from the checkpoint's shapes and the vocabulary that lies in this repository.

HEAD    channels of an attention head; 64 in every released model
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = (
    Path(__file__).parents[2] / "models" / "emoji" / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
)


def main(checkpoint: Path, out: Path, head: int = 64) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, config in configs(shapes_of(checkpoint), head).items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(config))
        write_tokenizer(folder / "tokenizer")
        pipe = StableDiffusionPipeline.from_single_file(
            str(checkpoint), config=scratch, torch_dtype=torch.float16, local_files_only=True,
            safety_checker=None,
        )  # fmt: skip
        pipe.save_pretrained(out)


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def configs(shapes: dict[str, tuple[int, ...]], head: int) -> dict[str, dict[str, Any]]:
    """The config files of each part, by their place in the folder."""
    unet, vae = "model.diffusion_model.", "first_stage_model."
    text = "cond_stage_model.model."
    first = shapes[f"{unet}input_blocks.0.0.weight"][0]
    channels = [first * m for m in (1, 2, 4, 4)]
    context = shapes[f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1]
    vae_first = shapes[f"{vae}encoder.conv_in.weight"][0]
    width = shapes[f"{text}ln_final.weight"][0]
    layers = sum(name.endswith("ln_1.weight") for name in shapes if name.startswith(text))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
        },
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "layers_per_block": 2,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "in_channels": shapes[f"{unet}input_blocks.0.0.weight"][1],
            "out_channels": 4,
            "block_out_channels": channels,
            "attention_head_dim": [c // head for c in channels],  # diffusers means their number
            "cross_attention_dim": context,
            "use_linear_projection": True,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            **blocks,
            "block_out_channels": [vae_first * m for m in (1, 2, 4, 4)],
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 512,
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers - 1,  # the model is conditioned on the last but one
            "num_attention_heads": width // head,
            "hidden_act": "gelu",
            "projection_dim": 512,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "prediction_type": "epsilon",
        },
    }


def write_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary in transformers' layout. Padding is `!`, token 0, as in training."""
    from transformers import CLIPTokenizer

    merges = gzip.open(VOCABULARY).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    rules.write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = CLIPTokenizer(str(vocabulary), str(rules), pad_token="!", model_max_length=77)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    source, target, *rest = sys.argv[1:]
    main(Path(source), Path(target), *map(int, rest))
