"""Which model is it? From names and shapes of the tensors, nothing else.

source      reference-spec of Stable Diffusion 2, sections 0 and 2.6
checked by  tests/unit/checkpoint/test_sizes.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..engine.bundle import Prediction, Variant
from ..engine.errors import NotACheckpoint, UnknownFact

Shapes = Mapping[str, tuple[int, ...]]

_UNET = "model.diffusion_model."
_FIRST_ATTENTION = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
)
EXPECTED = "expected a Stable Diffusion 2.x model: " + ", ".join(
    ("model.diffusion_model.*", "first_stage_model.*", "cond_stage_model.model.*")
)


@dataclass(frozen=True)
class Family:
    """What all published models of a variant have in common.

    prediction  None where both kinds were published
    native      pixels of a side, by prediction
    """

    prediction: Prediction | None
    scale: float
    beta_start: float
    beta_end: float
    native: Mapping[Prediction, int]


_SD = (0.18215, 0.00085, 0.012)
FAMILIES: Mapping[Variant, Family] = {
    "base": Family(None, *_SD, {"eps": 512, "v": 768}),
    "inpainting": Family("eps", *_SD, {"eps": 512, "v": 512}),
    "depth": Family("eps", *_SD, {"eps": 512, "v": 512}),
    "x4-upscaler": Family("v", 0.08333, 0.0001, 0.02, {"eps": 512, "v": 512}),
    "unclip-h": Family("v", *_SD, {"eps": 768, "v": 768}),
    "unclip-l": Family("v", *_SD, {"eps": 768, "v": 768}),
}


def refuse_others(path: object, shapes: Shapes) -> None:
    """Raises NotACheckpoint when the names are those of another kind of file, and says of which."""
    for what, looks in _OTHERS:
        if looks(shapes):
            raise NotACheckpoint(
                f"{path} looks like {what}; {EXPECTED}",
                hint="sdengine takes whole Stable Diffusion 2.0 and 2.1 models",
            )


def find_variant(shapes: Shapes, stated: str | None) -> Variant:
    """The variant. `stated` is a config's word; it is used only where shapes leave two choices.

    raises      NotACheckpoint for a UNet of no known variant, UnknownFact
    """
    channels = shapes[_UNET + "input_blocks.0.0.weight"][1]
    labels = _UNET + "label_emb.weight" in shapes
    adm = shapes.get(_UNET + "label_emb.0.0.weight")
    if channels == 7 and labels:
        return "x4-upscaler"
    if not labels and adm is None and channels in _BY_CHANNELS:
        return _BY_CHANNELS[channels]
    if channels == 4 and adm is not None:
        return _unclip(shapes, adm[1], stated)
    kind = "class labels" if labels else "a class vector" if adm else "no class input"
    raise NotACheckpoint(
        f"a UNet with {channels} input channels and {kind} is none of the Stable Diffusion 2 "
        "variants (4, 5 or 9 channels; 7 with class labels; 4 with a class vector)",
        hint="models of 8 channels (instruct-pix2pix) and other extensions are not supported",
    )


_BY_CHANNELS: Mapping[int, Variant] = {4: "base", 5: "depth", 9: "inpainting"}


def _unclip(shapes: Shapes, adm: int, stated: str | None) -> Variant:
    if adm in (2048, 1536):
        return "unclip-h" if adm == 2048 else "unclip-l"
    if stated == "unclip-h" or stated == "unclip-l":
        return stated  # type: ignore[return-value]
    if _any(shapes, "embedder.model.transformer."):
        return "unclip-l"  # a whole CLIP is stored
    if _any(shapes, "embedder.model."):
        return "unclip-h"
    raise UnknownFact(
        f"unclip-h or unclip-l? The class vector has {adm} entries (2048 and 1536 are known), and "
        "no image tower is in the file",
        hint='state it: --config FILE.json with {"variant": "unclip-h", ...}',
    )


# -- what else it may be -----------------------------------------------------------------------


def _any(shapes: Shapes, *starts: str) -> bool:
    return any(name.startswith(starts) for name in shapes)


def _within(shapes: Shapes, *pieces: str) -> bool:
    return any(piece in name for name in shapes for piece in pieces)


def _sd1(shapes: Shapes) -> bool:
    if _any(shapes, "cond_stage_model.transformer."):
        return True
    widths = [shapes[_UNET + n][1] for n in _FIRST_ATTENTION if _UNET + n in shapes]
    return bool(widths) and widths[0] == 768


def _sdxl(shapes: Shapes) -> bool:
    adm = shapes.get(_UNET + "label_emb.0.0.weight", (0, 0))
    return _any(shapes, "conditioner.embedders.1.") or adm[1] in (2816, 2560)


# In this order: a LoRA of an SDXL model is a LoRA.
_OTHERS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    (
        "a LoRA or another adapter, not a whole model",
        lambda s: (
            _any(s, "lora_unet_", "lora_te", "lycoris_")
            or _within(s, ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1_", "_lora.")
        ),
    ),
    (
        "a ControlNet, not a whole model",
        lambda s: (
            _any(s, "control_model.", "controlnet_cond_embedding.", "input_hint_block.")
            or _within(s, "zero_convs.")
        ),
    ),
    ("a textual inversion embedding", lambda s: len(s) <= 3 and ("emb_params" in s or "*" in s)),
    ("Stable Diffusion XL", _sdxl),
    (
        "a model in the layout of Stability's generative-models (conditioner.embedders.*)",
        lambda s: _any(s, "conditioner.embedders."),
    ),
    ("Stable Diffusion 3", lambda s: _within(s, "joint_blocks.", "joint_transformer_blocks.")),
    ("Flux", lambda s: _within(s, "double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 1.x", _sd1),
    (
        "one part of a diffusers folder (give the folder that holds model_index.json)",
        lambda s: (
            _any(s, "down_blocks.", "text_model.", "encoder.down_blocks.")
            and not _any(s, _UNET, "first_stage_model.")
        ),
    ),
    (
        "a VAE alone",
        lambda s: (
            not _any(s, _UNET, "cond_stage_model.")
            and _any(s, "first_stage_model.", "encoder.down.", "decoder.up.")
        ),
    ),
    (
        "the averaged copy of a model without the model",
        lambda s: not _any(s, _UNET) and _any(s, "model_ema.diffusion_model"),
    ),
    ("no Stable Diffusion model (no UNet in it)", lambda s: not _any(s, _UNET)),
)
