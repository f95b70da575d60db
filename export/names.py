"""diffusers and transformers names and layouts -> those of the original checkpoint.

Each function takes one component's tensors and gives them under LDM names. A name that no rule
knows keeps its own, with the component in front, and so ends in the list of unexpected tensors.

source      reference-spec of Stable Diffusion 2, sections 2.3 to 2.5
checked by  tests/unit/checkpoint/test_diffusers.py, against diffusers' own networks
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from .containers import TensorRef, joined, transposed
from .modules import depth, image_encoder, text, unet, vae

Tensors = Mapping[str, TensorRef]
Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


def from_unet(tensors: Tensors) -> dict[str, TensorRef]:
    layers = _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\.")
    attending = {
        int(m[1]) for n in tensors if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))
    }
    rules = _unet_rules(layers, attending)
    return _renamed(tensors, unet.PREFIX, "unet", rules)


def from_vae(tensors: Tensors) -> dict[str, TensorRef]:
    levels = _count(tensors, r"decoder\.up_blocks\.(\d+)\.")
    mapped = _renamed(tensors, vae.PREFIX, "vae", _vae_rules(levels))
    return {name: _as_convolution(ref) for name, ref in mapped.items()}


def from_text(tensors: Tensors) -> dict[str, TensorRef]:
    """The names of transformers, with and without the `text_model.` that 5.6 dropped."""
    plain = {name.removeprefix("text_model."): ref for name, ref in tensors.items()}
    plain = {name: ref for name, ref in plain.items() if name not in _TEXT_DROPPED}
    return _renamed(_fused(plain), text.PREFIX, "text_encoder", _TEXT_RULES)


def from_image(tensors: Tensors) -> dict[str, TensorRef]:
    """CLIPVisionModelWithProjection, with and without its `vision_model.`."""
    plain = {name.removeprefix("vision_model."): ref for name, ref in tensors.items()}
    plain = {name: ref for name, ref in plain.items() if name not in _TEXT_DROPPED}
    mapped = _renamed(_fused(plain), image_encoder.PREFIX, "image_encoder", _IMAGE_RULES)
    projection = image_encoder.PREFIX + "proj"
    return mapped | {n: transposed(mapped[n]) for n in (projection,) if n in mapped}


def from_depth(tensors: Tensors) -> dict[str, TensorRef]:
    """DPTForDepthEstimation with a BiT backbone."""
    fused = _fused(tensors, _DPT_QKV, ("query", "key", "value"), "qkv")
    mapped = _renamed(fused, depth.PREFIX, "depth_estimator", _DEPTH_RULES)
    return {name: ref for name, ref in mapped.items() if not name.startswith(_DEPTH_DROPPED)}


# -- UNet --------------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_rules(layers: int, attending: set[int]) -> list[Rule]:
    """layers     residual blocks a level
    attending  up blocks with transformers: elsewhere the upsampler stands at index 1
    """
    # An input level is `layers` blocks and a downsampler, an output level `layers` + 1 blocks.
    step = layers + 1
    parts = "|".join(_RESNET)

    def upsampler(m: re.Match[str]) -> str:
        place = 2 if int(m[1]) in attending else 1
        return f"output_blocks.{int(m[1]) * step + layers}.{place}.conv.{m[2]}"

    return [
        *_exact(_UNET_SINGLE),
        (
            re.compile(rf"down_blocks\.(\d+)\.resnets\.(\d+)\.({parts})\.(\w+)"),
            lambda m: f"input_blocks.{1 + int(m[1]) * step + int(m[2])}.0.{_RESNET[m[3]]}.{m[4]}",
        ),
        (
            re.compile(r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)"),
            lambda m: f"input_blocks.{1 + int(m[1]) * step + int(m[2])}.1.{m[3]}",
        ),
        (
            re.compile(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)"),
            lambda m: f"input_blocks.{(int(m[1]) + 1) * step}.0.op.{m[2]}",
        ),
        (
            re.compile(rf"mid_block\.resnets\.([01])\.({parts})\.(\w+)"),
            lambda m: f"middle_block.{2 * int(m[1])}.{_RESNET[m[2]]}.{m[3]}",
        ),
        (re.compile(r"mid_block\.attentions\.0\.(.+)"), lambda m: f"middle_block.1.{m[1]}"),
        (
            re.compile(rf"up_blocks\.(\d+)\.resnets\.(\d+)\.({parts})\.(\w+)"),
            lambda m: f"output_blocks.{int(m[1]) * step + int(m[2])}.0.{_RESNET[m[3]]}.{m[4]}",
        ),
        (
            re.compile(r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)"),
            lambda m: f"output_blocks.{int(m[1]) * step + int(m[2])}.1.{m[3]}",
        ),
        (re.compile(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)"), upsampler),
    ]


# -- VAE ---------------------------------------------------------------------------------------

_VAE_SINGLE = {
    f"{side}.{ours}": f"{side}.{theirs}"
    for side in ("encoder", "decoder")
    for ours, theirs in (
        ("conv_in", "conv_in"),
        ("conv_norm_out", "norm_out"),
        ("conv_out", "conv_out"),
    )
} | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

# The second spelling of each is that of diffusers before 0.15.
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}


def _vae_rules(levels: int) -> list[Rule]:
    parts = "|".join(_VAE_RESNET)
    attention = "|".join(map(re.escape, _VAE_ATTENTION))
    return [
        *_exact(_VAE_SINGLE),
        (
            re.compile(rf"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.({parts})\.(\w+)"),
            lambda m: f"encoder.down.{m[1]}.block.{m[2]}.{_VAE_RESNET[m[3]]}.{m[4]}",
        ),
        (
            re.compile(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)"),
            lambda m: f"encoder.down.{m[1]}.downsample.conv.{m[2]}",
        ),
        # The original counts the decoder's levels from the highest resolution, diffusers from
        # the lowest.
        (
            re.compile(rf"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.({parts})\.(\w+)"),
            lambda m: (
                f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}.{_VAE_RESNET[m[3]]}.{m[4]}"
            ),
        ),
        (
            re.compile(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)"),
            lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample.conv.{m[2]}",
        ),
        (
            re.compile(rf"(encoder|decoder)\.mid_block\.resnets\.([01])\.({parts})\.(\w+)"),
            lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}.{_VAE_RESNET[m[3]]}.{m[4]}",
        ),
        (
            re.compile(rf"(encoder|decoder)\.mid_block\.attentions\.0\.({attention})\.(\w+)"),
            lambda m: f"{m[1]}.mid.attn_1.{_VAE_ATTENTION[m[2]]}.{m[3]}",
        ),
    ]


def _as_convolution(ref: TensorRef) -> TensorRef:
    """The attention's linear weights [C, C] are 1x1 convolutions [C, C, 1, 1] in the original."""
    linear = ".mid.attn_1." in ref.name and ref.name.endswith(".weight") and len(ref.shape) == 2
    return ref.named(ref.name, (*ref.shape, 1, 1)) if linear else ref


# -- text tower --------------------------------------------------------------------------------

_TEXT_DROPPED = ("embeddings.position_ids", "text_projection.weight")
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TEXT_RULES: list[Rule] = [
    (re.compile(r"embeddings\.token_embedding\.weight"), lambda m: "token_embedding.weight"),
    (re.compile(r"embeddings\.position_embedding\.weight"), lambda m: "positional_embedding"),
    (re.compile(r"final_layer_norm\.(\w+)"), lambda m: f"ln_final.{m[1]}"),
    (
        re.compile(rf"encoder\.layers\.(\d+)\.({'|'.join(map(re.escape, _TEXT_LAYER))})\.(\w+)"),
        lambda m: f"transformer.resblocks.{m[1]}.{_TEXT_LAYER[m[2]]}.{m[3]}",
    ),
    (
        re.compile(r"encoder\.layers\.(\d+)\.self_attn\.in_proj\.(\w+)"),
        lambda m: f"transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}",
    ),
]
_QKV = re.compile(r"(encoder\.layers\.\d+\.self_attn\.)(q_proj)\.(weight|bias)")
_QKV_NAMES = ("q_proj", "k_proj", "v_proj")


def _fused(
    tensors: Tensors,
    first: re.Pattern[str] = _QKV,
    three: tuple[str, ...] = _QKV_NAMES,
    into: str = "in_proj",
) -> dict[str, TensorRef]:
    """q, k and v of a layer as one tensor, in this order, where all three fit together.

    first       finds the names of q: what stands before, q's own name, weight or bias
    """
    result = dict(tensors)
    for name in tensors:
        match = first.fullmatch(name)
        if match is None:
            continue
        names = [f"{match[1]}{part}.{match[3]}" for part in three]
        parts = [tensors[n] for n in names if n in tensors]
        if len(parts) == 3 and len({(p.dtype, p.shape) for p in parts}) == 1:
            for n in names:
                del result[n]
            fused = f"{match[1]}{into}.{match[3]}"
            result[fused] = joined(fused, parts)
    return result


# -- image tower -------------------------------------------------------------------------------

_IMAGE_RULES: list[Rule] = [
    (re.compile(r"embeddings\.class_embedding"), lambda m: "class_embedding"),
    (re.compile(r"embeddings\.patch_embedding\.weight"), lambda m: "conv1.weight"),
    (re.compile(r"embeddings\.position_embedding\.weight"), lambda m: "positional_embedding"),
    (re.compile(r"pre_layrnorm\.(\w+)"), lambda m: f"ln_pre.{m[1]}"),  # their own spelling
    (re.compile(r"post_layernorm\.(\w+)"), lambda m: f"ln_post.{m[1]}"),
    (re.compile(r"visual_projection\.weight"), lambda m: "proj"),
    *_TEXT_RULES[-2:],  # the blocks are those of the text tower
]

# -- depth network -----------------------------------------------------------------------------

_DPT_QKV = re.compile(r"(dpt\.encoder\.layer\.\d+\.attention\.attention\.)(query)\.(weight|bias)")
_DEPTH_DROPPED = (
    depth.PREFIX + "pretrained.model.norm.",
    depth.PREFIX + "scratch.refinenet4.resConfUnit1.",
)
_DPT_LAYER = {
    "attention.attention.qkv": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_BACKBONE, _BIT = "pretrained.model.", r"dpt\.embeddings\.backbone\.bit\."
_RESNET50 = "pretrained.model.patch_embed.backbone."
_DEPTH_RULES: list[Rule] = [
    (re.compile(r"dpt\.embeddings\.cls_token"), lambda m: _BACKBONE + "cls_token"),
    (re.compile(r"dpt\.embeddings\.position_embeddings"), lambda m: _BACKBONE + "pos_embed"),
    (
        re.compile(r"dpt\.embeddings\.projection\.(\w+)"),
        lambda m: f"{_BACKBONE}patch_embed.proj.{m[1]}",
    ),
    (
        re.compile(_BIT + r"embedder\.convolution\.(\w+)"),
        lambda m: f"{_RESNET50}stem.conv.{m[1]}",
    ),
    (re.compile(_BIT + r"embedder\.norm\.(\w+)"), lambda m: f"{_RESNET50}stem.norm.{m[1]}"),
    (
        re.compile(_BIT + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)"),
        lambda m: f"{_RESNET50}stages.{m[1]}.blocks.{m[2]}.{m[3]}",
    ),
    (
        re.compile(rf"dpt\.encoder\.layer\.(\d+)\.({'|'.join(map(re.escape, _DPT_LAYER))})\.(\w+)"),
        lambda m: f"{_BACKBONE}blocks.{m[1]}.{_DPT_LAYER[m[2]]}.{m[3]}",
    ),
    (re.compile(r"dpt\.layernorm\.(\w+)"), lambda m: f"{_BACKBONE}norm.{m[1]}"),
    # transformers counts the taps from 0, the fusions from the coarsest.
    (
        re.compile(r"neck\.reassemble_stage\.readout_projects\.([23])\.0\.(\w+)"),
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.0.project.0.{m[2]}",
    ),
    (
        re.compile(r"neck\.reassemble_stage\.layers\.([23])\.(projection|resize)\.(\w+)"),
        lambda m: (
            f"pretrained.act_postprocess{int(m[1]) + 1}.{3 if m[2] == 'projection' else 4}.{m[3]}"
        ),
    ),
    (re.compile(r"neck\.convs\.(\d)\.(\w+)"), lambda m: f"scratch.layer{int(m[1]) + 1}_rn.{m[2]}"),
    (
        re.compile(r"neck\.fusion_stage\.layers\.(\d)\.projection\.(\w+)"),
        lambda m: f"scratch.refinenet{4 - int(m[1])}.out_conv.{m[2]}",
    ),
    (
        re.compile(
            r"neck\.fusion_stage\.layers\.(\d)\.residual_layer([12])\.convolution([12])\.(\w+)"
        ),
        lambda m: f"scratch.refinenet{4 - int(m[1])}.resConfUnit{m[2]}.conv{m[3]}.{m[4]}",
    ),
    (re.compile(r"head\.head\.(\d)\.(\w+)"), lambda m: f"scratch.output_conv.{m[1]}.{m[2]}"),
]

# -- shared ------------------------------------------------------------------------------------


def _exact(names: Mapping[str, str]) -> Iterable[Rule]:
    for ours, theirs in names.items():
        yield re.compile(re.escape(ours) + r"\.(\w+)"), lambda m, to=theirs: f"{to}.{m[1]}"  # type: ignore[misc]


def _renamed(
    tensors: Tensors, prefix: str, component: str, rules: list[Rule]
) -> dict[str, TensorRef]:
    result = {}
    for name, ref in tensors.items():
        new = next((make(m) for pattern, make in rules if (m := pattern.fullmatch(name))), None)
        full = f"{component}: {name}" if new is None else prefix + new
        result[full] = ref.named(full)
    return result


def _count(tensors: Tensors, pattern: str) -> int:
    """One more than the highest number that the pattern finds; 0 when it finds none."""
    return max((int(m[1]) + 1 for n in tensors if (m := re.match(pattern, n))), default=0)
