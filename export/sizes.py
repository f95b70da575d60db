"""The sizes of the three networks, read off the tensors' shapes.

What shapes cannot tell (heads, how many text blocks run) comes from a config, or from the family
rule of the published models, which holds at their full width only.

checked by  tests/unit/checkpoint/test_sizes.py, against the configs of the key lists
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..engine.errors import BadConfig, TensorMismatch, UnknownFact
from .modules import text, unet, vae

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

UNET, VAE, TEXT = unet.PREFIX, vae.PREFIX, text.PREFIX
PASS_CONFIG = (
    "pass the model's own yaml, or a JSON of the same facts, with --config FILE, "
    "or put the yaml beside the file under the same name"
)


def unet_config(shapes: Shapes, stated: Mapping[str, Any]) -> Config:
    """Constructor facts in the form that `UNetConfig.from_ldm` takes.

    stated      what a config says; it decides the heads, and must not contradict the shapes
    raises      TensorMismatch, UnknownFact, BadConfig
    """
    conv_in = shape_of(shapes, UNET + "input_blocks.0.0.weight")
    width = conv_in[0]
    levels = _unet_levels(shapes)
    attention = [
        2**i for i, level in enumerate(levels) if any(_has_attention(shapes, n) for n in level)
    ]
    blocks = [f"input_blocks.{n}.1." for level in levels for n in level] + ["middle_block.1."]
    to_k = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    context_dim = shape_of(shapes, to_k)[1]
    found: Config = {
        "in_channels": conv_in[1],
        "out_channels": shape_of(shapes, UNET + "out.2.weight")[0],
        "model_channels": width,
        "channel_mult": [_width(shapes, level[0]) // width for level in levels],
        "num_res_blocks": max(len(level) for level in levels),
        "attention_resolutions": attention,
        "context_dim": context_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": all(
            len(shapes[name]) == 2 for b in blocks if (name := f"{UNET}{b}proj_in.weight") in shapes
        ),
        "transformer_depth": count(shapes, UNET + "middle_block.1.transformer_blocks."),
    }
    if (label := shapes.get(UNET + "label_emb.weight")) is not None:
        found["num_classes"] = label[0]
    elif (label := shapes.get(UNET + "label_emb.0.0.weight")) is not None:
        found |= {"num_classes": "sequential", "adm_in_channels": label[1]}
    agree("unet", found, stated)
    cross = _cross_only(shapes, levels, context_dim, stated)
    switches = {k: v for k, v in stated.items() if k in _SWITCHES and v is not None}
    return switches | found | _unet_heads(found, stated) | cross


# Switches that shapes do not show; UNetConfig.from_ldm refuses the values it cannot build.
_SWITCHES = (
    "disable_middle_self_attn",
    "use_scale_shift_norm",
    "resblock_updown",
    "conv_resample",
    "dims",
)


def vae_config(shapes: Shapes, stated: Mapping[str, Any]) -> Config:
    """Constructor facts in the form that `VAEConfig.from_ldm` takes. Raises as `unet_config`."""
    conv_in = shape_of(shapes, VAE + "encoder.conv_in.weight")
    levels = count(shapes, VAE + "encoder.down.")
    widths = [
        shape_of(shapes, f"{VAE}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)
    ]
    found: Config = {
        "double_z": True,
        "in_channels": conv_in[1],
        "ch": conv_in[0],
        "ch_mult": [w // conv_in[0] for w in widths],
        "num_res_blocks": max(
            count(shapes, f"{VAE}encoder.down.{i}.block.") for i in range(levels)
        ),
        "attn_resolutions": [],
        "z_channels": shape_of(shapes, VAE + "decoder.conv_in.weight")[1],
        "embed_dim": shape_of(shapes, VAE + "post_quant_conv.weight")[1],
        "out_ch": shape_of(shapes, VAE + "decoder.conv_out.weight")[0],
    }
    agree("vae", found, stated)
    return found


def text_config(shapes: Shapes, stated: Mapping[str, Any]) -> Config:
    """Constructor facts in the form that `TextConfig.from_ldm` takes. Raises as `unet_config`."""
    vocab_size, width = shape_of(shapes, TEXT + "token_embedding.weight")
    stored = count(shapes, TEXT + "transformer.resblocks.")
    found: Config = {
        "width": width,
        "vocab_size": vocab_size,
        "context_length": shape_of(shapes, TEXT + "positional_embedding")[0],
    }
    agree("text", found, stated)
    used = _layers_used(width, stored, TEXT + "text_projection" in shapes, stated)
    heads = stated.get("heads")
    if heads is None and width == 1024:
        heads = 16
    if heads is None:
        raise UnknownFact(
            f"the heads of a text tower of width {width} are not in the file "
            "(only at width 1024 is the number known: 16)",
            hint=PASS_CONFIG,
        )
    _divides("text", "heads", heads, [width])
    activation = stated.get("activation", "gelu")
    return found | {
        "layers_stored": stored,
        "layers_used": used,
        "heads": heads,
        "activation": activation,
    }


# -- the UNet's levels -------------------------------------------------------------------------


def _unet_levels(shapes: Shapes) -> list[list[int]]:
    """Numbers of the input blocks that hold a residual block, level by level."""
    levels: list[list[int]] = [[]]
    for n in range(1, count(shapes, UNET + "input_blocks.")):
        if f"{UNET}input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(n)
    if not all(levels):
        raise _missing([f"{UNET}input_blocks.N.0.* (a level without a residual block)"])
    return levels


def _width(shapes: Shapes, block: int) -> int:
    return shape_of(shapes, f"{UNET}input_blocks.{block}.0.out_layers.3.weight")[0]


def _has_attention(shapes: Shapes, block: int) -> bool:
    return f"{UNET}input_blocks.{block}.1.proj_in.weight" in shapes


def _cross_only(
    shapes: Shapes, levels: list[list[int]], context_dim: int, stated: Mapping[str, Any]
) -> Config:
    """`disable_self_attentions`: the levels whose first attention looks at the text.

    Where a level is as wide as the text, both kinds have the same shapes and the config decides;
    without one the level keeps its self-attention, as in the published models.
    """
    says = stated.get("disable_self_attentions")
    says = [False] * len(levels) if says is None else says
    if not isinstance(says, list) or len(says) != len(levels):
        raise BadConfig(
            f"the config states disable_self_attentions {says!r}; "
            f"the UNet has {len(levels)} levels",
            hint="give the config that belongs to this model",
        )
    result, wrong = [], []
    for i, level in enumerate(levels):
        name = f"{UNET}input_blocks.{level[0]}.1.transformer_blocks.0.attn1.to_k.weight"
        if name not in shapes:
            result.append(bool(says[i]))
            continue
        width, eats = _width(shapes, level[0]), shapes[name][1]
        shown = None if width == context_dim else eats == context_dim
        result.append(bool(says[i]) if shown is None else shown)
        if (
            shown is not None
            and stated.get("disable_self_attentions") is not None
            and shown != bool(says[i])
        ):
            wrong.append(i)
    if wrong:
        raise BadConfig(
            f"the config states disable_self_attentions {says}; level {wrong[0]} is the other way",
            hint="give the config that belongs to this model",
        )
    return {"disable_self_attentions": result} if any(result) else {}


def _unet_heads(found: Config, stated: Mapping[str, Any]) -> Config:
    widths = [found["model_channels"] * m for m in found["channel_mult"]]
    attending = [w for i, w in enumerate(widths) if 2**i in found["attention_resolutions"]]
    for name in ("num_head_channels", "num_heads"):
        value = stated.get(name)
        if value is not None and value != -1:  # -1 is LDM's own "not set"
            _divides("unet", name, value, [*attending, widths[-1]])
            return {name: value}
    if found["model_channels"] == 320:
        return {"num_head_channels": 64}
    if found["model_channels"] == 256 and found["in_channels"] == 7:
        return {"num_heads": 8}
    raise UnknownFact(
        f"the attention heads of a UNet with {found['model_channels']} model channels are not in "
        "the file (only for the published sizes, 320, and 256 of the x4 upscaler, are they known)",
        hint=PASS_CONFIG,
    )


def _layers_used(width: int, stored: int, whole: bool, stated: Mapping[str, Any]) -> int:
    """Blocks that run. The last one of a whole tower does not (`layer: penultimate`)."""
    used = stated.get("layers_used")
    if used is None:
        if stated.get("layer") == "last":
            used = stored
        elif width == 1024 and stored in (23, 24):
            used = 23  # some files leave the idle block out
        elif whole:
            used = stored - 1
    if used is None:
        raise UnknownFact(
            f"how many of the {stored} stored text blocks run is not in the file",
            hint=PASS_CONFIG,
        )
    if type(used) is not int or used < 1:
        raise BadConfig(
            f"the config lets {used!r} text blocks run, expected a number from 1 to {stored}",
            hint="give the config that belongs to this model",
        )
    return used


# -- small readers -----------------------------------------------------------------------------


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise _missing([name])
    return shapes[name]


def _missing(names: Iterable[str]) -> TensorMismatch:
    return TensorMismatch(
        "the sizes of the networks cannot be read; missing: " + ", ".join(names),
        hint="the file is incomplete, or it is no Stable Diffusion 2 model; fetch it again",
    )


def count(shapes: Shapes, prefix: str) -> int:
    """One more than the highest number that stands directly after the prefix; at least 1."""
    at = len(prefix)
    numbers = {name[at:].split(".", 1)[0] for name in shapes if name.startswith(prefix)}
    if not (found := [int(n) for n in numbers if n.isdecimal()]):
        raise _missing([prefix + "*"])
    return max(found) + 1


def agree(part: str, found: Config, stated: Mapping[str, Any]) -> None:
    """Raises BadConfig where a config contradicts the tensors."""

    def plain(value: Any) -> Any:
        return sorted(value, key=repr) if isinstance(value, list) else value

    wrong = [
        f"{part}.{name}: config {stated[name]!r}, tensors {value!r}"
        for name, value in found.items()
        if name in stated
        and (plain(stated[name]) != plain(value) if name in _UNORDERED else stated[name] != value)
    ]
    if wrong:
        raise BadConfig(
            "the config and the tensors contradict each other: " + "; ".join(wrong),
            hint="give the config that belongs to this model with --config FILE",
        )


_UNORDERED = ("attention_resolutions",)


def _divides(part: str, name: str, value: Any, widths: Iterable[int]) -> None:
    if type(value) is not int or value < 1 or any(w % value for w in widths):
        raise BadConfig(
            f"{part}.{name}: the config states {value!r}, which does not divide "
            f"{', '.join(map(str, dict.fromkeys(widths)))}",
            hint="give the config that belongs to this model with --config FILE",
        )
