"""What is said about a model outside its tensors: LDM yaml, JSON, diffusers configs, our manifest.

Each reader brings its source into one form, `Stated`, under LDM's own parameter names. A source
that is silent about a fact leaves it out; nothing is filled in here.

checked by  tests/unit/checkpoint/test_facts.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..engine.errors import BadConfig
from .containers import cannot_read

Params = Mapping[str, Any]

_FITS = "give the LDM yaml of this model, or a JSON with the keys unet, vae, text, prediction, ..."


NOTHING = "nothing"


@dataclass(frozen=True)
class Stated:
    """Facts and where they come from; None where the source is silent.

    unet, vae, text   constructor facts, as LDM names them
    depth             of the depth network; image_encoder: of the image tower
    low_scale         of the x4 upscaler's small picture: beta_start, beta_end, timesteps, max_level
    noise_timesteps   levels of the noise of an image embedding
    image_size        side of the latent that the model was made for
    pad               id that fills a prompt up
    prediction_from   the source of `prediction`
    """

    where: str = NOTHING
    unet: Params = field(default_factory=dict)
    vae: Params = field(default_factory=dict)
    text: Params = field(default_factory=dict)
    depth: Params = field(default_factory=dict)
    image_encoder: Params = field(default_factory=dict)
    low_scale: Params = field(default_factory=dict)
    noise_timesteps: int | None = None
    variant: str | None = None
    prediction: str | None = None
    scale: float | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    timesteps: int | None = None
    image_size: int | None = None
    pad: int | None = None
    licence: str | None = None
    prediction_from: str | None = None

    def __post_init__(self) -> None:
        if self.prediction is not None and self.prediction_from is None:
            object.__setattr__(self, "prediction_from", self.where)

    def over(self, other: Stated) -> Stated:
        """These facts, and the other's where these are silent."""
        if other.where == NOTHING:
            return self
        mine = {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None and f.name not in _PARTS
        }
        merged = {name: {**getattr(other, name), **getattr(self, name)} for name in _PARTS}
        where = f"{self.where} (over {other.where})"
        return replace(other, **{**mine, **merged, "where": where})


_NETWORKS = ("unet", "vae", "text")
_PARTS = (*_NETWORKS, "depth", "image_encoder", "low_scale")


def read_config(path: Path) -> Stated:
    """A file given with --config, or found beside the model. Raises BadConfig, StorageError."""
    try:
        raw = path.read_text(encoding="utf-8")
        document = json.loads(raw) if path.suffix == ".json" else yaml.safe_load(raw)
    except FileNotFoundError as error:
        raise BadConfig(f"the config {path} does not exist", hint="check the path") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise BadConfig(f"the config {path} is not sound {kind}: {error}", hint=_FITS) from error
    if not isinstance(document, dict):
        raise BadConfig(f"the config {path} holds no facts", hint=_FITS)
    reader = Reader(str(path))
    if isinstance(document.get("model"), dict):
        return _ldm(reader, document)
    if "num_train_timesteps" in document:
        return _scheduler(reader, document)
    if isinstance(document.get("config"), dict):  # a key list holds its config under that name
        document = {**document["config"], "variant": document.get("variant")}
    return _flat(reader, document)


class Reader:
    """Takes values out of parsed text, with the place named in every complaint."""

    def __init__(self, where: str) -> None:
        self.where = where

    def part(self, source: Params, *names: str) -> Params:
        """A nested object; empty where it is absent."""
        for name in names:
            value = source.get(name)
            if value is not None and not isinstance(value, dict):
                raise self.bad(name, value, "an object")
            source = value if value is not None else {}
        return source

    def number(self, source: Params, name: str) -> float | None:
        """A finite number; YAML reads 1e-4 as a text, so a text that spells a number is one."""
        return self._as(source, name, float, "a number")

    def whole(self, source: Params, name: str) -> int | None:
        value = self._as(source, name, float, "a whole number")
        if value is None:
            return None
        if value != int(value) or value < 0:
            raise self.bad(name, source[name], "a whole number")
        return int(value)

    def _as(
        self, source: Params, name: str, make: Callable[[Any], float], kind: str
    ) -> float | None:
        value = source.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, bool) or not abs(number := make(value)) < 1e300:
                raise ValueError(value)
        except (TypeError, ValueError) as error:
            raise self.bad(name, value, kind) from error
        return number

    def choice(self, source: Params, name: str, known: Mapping[str, str]) -> str | None:
        value = source.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in known:
            raise self.bad(name, value, " or ".join(known))
        return known[value]

    def require(self, source: Params, wanted: Params) -> None:
        """Each of these, where it is stated, has the one value that Stable Diffusion 2 has."""
        for name, want in wanted.items():
            if name in source and source[name] not in want:
                shown = " or ".join(repr(w) for w in want)
                raise self.bad(name, source[name], shown)

    def bad(self, name: str, value: Any, expected: str) -> BadConfig:
        return BadConfig(
            f"{self.where}: {name} is {str(value)[:80]!r}, expected {expected}", hint=_FITS
        )


PREDICTIONS: Mapping[str, str] = {
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "velocity": "v",  # the first upload of stable-diffusion-2
}


def _ldm(reader: Reader, document: Params) -> Stated:
    """The layout of the reference's own yaml files."""
    params = reader.part(document, "model", "params")
    unet = reader.part(params, "unet_config", "params")
    if not unet:
        raise reader.bad("model.params.unet_config.params", "not there", "the UNet's parameters")
    first = reader.part(params, "first_stage_config", "params")
    reader.require(params, {"beta_schedule": ("linear",), "scale_by_std": (False,)})
    vae = dict(reader.part(first, "ddconfig"))
    if "embed_dim" in first:
        vae["embed_dim"] = first["embed_dim"]
    # Absent means eps to the reference class, so an LDM yaml is never silent about it.
    prediction = reader.choice(
        {"parameterization": "eps", **params}, "parameterization", PREDICTIONS
    )
    return Stated(
        where=reader.where,
        unet=unet,
        vae=vae,
        text=_text(reader, reader.part(params, "cond_stage_config", "params")),
        depth=_depth(reader, reader.part(params, "depth_stage_config", "params")),
        image_encoder=_image(reader, reader.part(params, "embedder_config", "params")),
        low_scale=_low_scale(reader, reader.part(params, "low_scale_config", "params")),
        noise_timesteps=_noise(reader, reader.part(params, "noise_aug_config", "params")),
        prediction=prediction,
        scale=reader.number(params, "scale_factor"),
        beta_start=reader.number(params, "linear_start"),
        beta_end=reader.number(params, "linear_end"),
        timesteps=reader.whole(params, "timesteps"),
        image_size=reader.whole(params, "image_size"),
        licence=_words(reader, document, "licence"),
    )


def _flat(reader: Reader, document: Params) -> Stated:
    """The facts side by side, as the key lists hold them."""
    if not any(name in document for name in (*_NETWORKS, "prediction")):
        raise BadConfig(
            f"{reader.where} states none of {', '.join(_NETWORKS)}, prediction", hint=_FITS
        )
    reader.require(document, {"beta_schedule": ("linear", "scaled_linear")})
    text = reader.part(document, "text")
    return Stated(
        where=reader.where,
        unet=reader.part(document, "unet"),
        vae=reader.part(document, "vae"),
        text=_text(reader, text),
        depth=_depth(reader, reader.part(document, "depth_model")),
        image_encoder=_image(reader, reader.part(document, "image_embedder")),
        low_scale=_low_scale(reader, reader.part(document, "low_scale")),
        noise_timesteps=_noise(reader, reader.part(document, "noise_aug")),
        variant=_words(reader, document, "variant"),
        prediction=reader.choice(document, "prediction", PREDICTIONS),
        scale=reader.number(document, "scale_factor"),
        beta_start=reader.number(document, "linear_start"),
        beta_end=reader.number(document, "linear_end"),
        timesteps=reader.whole(document, "timesteps"),
        image_size=reader.whole(document, "image_size"),
        pad=reader.whole(text, "pad_id"),
        licence=_words(reader, document, "licence"),
    )


def _text(reader: Reader, text: Params) -> Params:
    reader.choice(text, "layer", {"penultimate": "penultimate", "last": "last"})
    return text


def _depth(reader: Reader, depth: Params) -> Params:
    return _said(heads=reader.whole(reader.part(depth, "vit"), "heads"))


def _image(reader: Reader, tower: Params) -> Params:
    return _said(heads=reader.whole(tower, "heads"), activation=tower.get("activation"))


def _low_scale(reader: Reader, low_scale: Params) -> Params:
    schedule = reader.part(low_scale, "noise_schedule_config")
    reader.require(schedule, {"beta_schedule": ("linear",)})
    return _said(
        beta_start=reader.number(schedule, "linear_start"),
        beta_end=reader.number(schedule, "linear_end"),
        timesteps=reader.whole(schedule, "timesteps"),
        max_level=reader.whole(low_scale, "max_noise_level"),
    )


def _noise(reader: Reader, noise: Params) -> int | None:
    schedule = reader.part(noise, "noise_schedule_config") or noise
    reader.require(schedule, {"beta_schedule": ("squaredcos_cap_v2",)})
    return reader.whole(schedule, "timesteps")


def _said(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _words(reader: Reader, source: Params, name: str) -> str | None:
    value = source.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise reader.bad(name, value, "a text")
    return value


# -- diffusers ---------------------------------------------------------------------------------

# The values that Stable Diffusion 2 networks have where others have a choice.
_UNET_FIXED: Params = {
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "center_input_sample": (False,),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "class_embed_type": (None, "projection"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "use_linear_projection": (True,),
}
_VAE_FIXED: Params = {
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "shift_factor": (None, 0, 0.0),
}
_TEXT_FIXED: Params = {"hidden_act": ("gelu",), "layer_norm_eps": (1e-5,)}
_DEPTH_FIXED: Params = {
    "is_hybrid": (True,),
    "readout_type": ("project",),
    "backbone_out_indices": ([2, 5, 8, 11],),
    "hidden_act": ("gelu",),
    "add_projection": (False,),
    "use_batch_norm_in_fusion_residual": (False,),
}
_IMAGE_FIXED: Params = {
    "hidden_act": ("gelu", "quick_gelu"),
    "layer_norm_eps": (1e-5,),
    "num_channels": (3,),
}
_NOISE_FIXED: Params = {"beta_schedule": ("squaredcos_cap_v2",), "trained_betas": (None,)}
_SCHEDULER_FIXED: Params = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
}


def diffusers_config(
    where: str, parts: Mapping[str, Params], vocabulary: Mapping[str, int] | None
) -> Stated:
    """From the JSON of `unet`, `vae`, `text_encoder`, `scheduler` and `tokenizer`, and, where the
    folder has them, `index`, `depth_estimator`, `image_encoder`, `low_res_scheduler` and
    `image_noising_scheduler`.

    vocabulary  the tokenizer's own, to find the pad id; None when it is not there
    raises      BadConfig
    """

    def reader(name: str) -> Reader:
        return Reader(f"{where}/{name}")

    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
    reader("unet").require(unet, _UNET_FIXED)
    reader("vae").require(vae, _VAE_FIXED)
    reader("text_encoder").require(text, _TEXT_FIXED)
    tower, noise = parts.get("image_encoder", {}), parts.get("image_noising_scheduler", {})
    reader("depth_estimator").require(parts.get("depth_estimator", {}), _DEPTH_FIXED)
    reader("image_encoder").require(tower, _IMAGE_FIXED)
    reader("image_noising_scheduler").require(noise, _NOISE_FIXED)
    scale = reader("vae").number(vae, "scaling_factor")
    networks = Stated(
        where=where,
        unet=_heads(reader("unet"), unet) | _cross_only(unet),
        text={
            "heads": reader("text_encoder").whole(text, "num_attention_heads"),
            "layers_used": reader("text_encoder").whole(text, "num_hidden_layers"),
        },
        depth=_said(
            heads=reader("depth_estimator").whole(
                parts.get("depth_estimator", {}), "num_attention_heads"
            )
        ),
        image_encoder=_said(
            heads=reader("image_encoder").whole(tower, "num_attention_heads"),
            activation=tower.get("hidden_act"),
        ),
        low_scale=_low_res(reader, parts),
        noise_timesteps=reader("image_noising_scheduler").whole(noise, "num_train_timesteps"),
        scale=0.18215 if scale is None else scale,  # diffusers' default
        image_size=_side(reader("unet"), unet),
        pad=_pad(parts["tokenizer"], vocabulary),
    )
    return networks.over(_scheduler(reader("scheduler"), parts["scheduler"]))


def _low_res(reader: Callable[[str], Reader], parts: Mapping[str, Params]) -> Params:
    scheduler = parts.get("low_res_scheduler", {})
    reader("low_res_scheduler").require(scheduler, _SCHEDULER_FIXED)
    return _said(
        beta_start=reader("low_res_scheduler").number(scheduler, "beta_start"),
        beta_end=reader("low_res_scheduler").number(scheduler, "beta_end"),
        timesteps=reader("low_res_scheduler").whole(scheduler, "num_train_timesteps"),
        max_level=reader("model_index.json").whole(parts.get("index", {}), "max_noise_level"),
    )


def _scheduler(reader: Reader, scheduler: Params) -> Stated:
    reader.require(scheduler, _SCHEDULER_FIXED)
    return Stated(
        where=reader.where,
        # Absent means epsilon to diffusers' schedulers.
        prediction=reader.choice(
            {"prediction_type": "epsilon", **scheduler}, "prediction_type", PREDICTIONS
        ),
        beta_start=reader.number(scheduler, "beta_start"),
        beta_end=reader.number(scheduler, "beta_end"),
        timesteps=reader.whole(scheduler, "num_train_timesteps"),
    )


def _heads(reader: Reader, unet: Params) -> dict[str, Any]:
    """diffusers states heads per level, under the name of their width.

    source      the note in diffusers' UNet2DConditionModel on `attention_head_dim`
    """
    widths = unet.get("block_out_channels")
    heads = unet.get("num_attention_heads")
    heads = unet.get("attention_head_dim") if heads is None else heads
    if heads is None or not isinstance(widths, list):
        return {}
    several = heads if isinstance(heads, list) else [heads] * len(widths)
    if len(several) != len(widths) or any(type(h) is not int or h < 1 for h in several):
        raise reader.bad("attention_head_dim", heads, f"a number, or {len(widths)} of them")
    if len({w / h for w, h in zip(widths, several, strict=True)}) == 1:
        return {"num_head_channels": widths[0] // several[0]}
    if len(set(several)) == 1:
        return {"num_heads": several[0]}
    raise reader.bad("attention_head_dim", heads, "equal heads, or heads of equal width")


def _cross_only(unet: Params) -> dict[str, Any]:
    cross = unet.get("only_cross_attention")
    levels = unet.get("block_out_channels")
    if not cross or not isinstance(levels, list):
        return {}
    return {"disable_self_attentions": cross if isinstance(cross, list) else [True] * len(levels)}


def _side(reader: Reader, unet: Params) -> int | None:
    return None if isinstance(unet.get("sample_size"), list) else reader.whole(unet, "sample_size")


def _pad(tokenizer: Params, vocabulary: Mapping[str, int] | None) -> int | None:
    token = tokenizer.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if vocabulary is None or not isinstance(token, str):
        return None
    return vocabulary.get(token)


# -- our own manifest --------------------------------------------------------------------------


def manifest_config(reader: Reader, manifest: Params) -> Stated:
    """From the `model` and the components' `config` of a bundle. Raises BadConfig."""
    model = reader.part(manifest, "model")
    components = reader.part(manifest, "components")
    unet = dict(reader.part(components, "unet", "config"))
    text = dict(reader.part(components, "text_encoder", "config"))
    latent = reader.part(model, "latent")
    schedule, low_scale = reader.part(model, "schedule"), reader.part(model, "low_scale")
    size: Sequence[Any] | None = model.get("native_size")
    factor = latent.get("factor")
    side = size[0] // factor if isinstance(size, list) and isinstance(factor, int) else None
    return Stated(
        where=reader.where,
        unet=_renamed(unet, _UNET_NAMES),
        vae=reader.part(components, "vae_decoder", "config"),
        text=_renamed(text, {"layers": "layers_used"}),
        depth=reader.part(components, "depth", "config"),
        image_encoder=reader.part(components, "image_encoder", "config"),
        low_scale=_said(
            **{n: reader.part(low_scale, "schedule").get(n) for n in _BETAS},
            max_level=low_scale.get("max_level"),
        ),
        noise_timesteps=reader.whole(
            reader.part(model, "image_conditioning", "noise"), "timesteps"
        ),
        variant=_words(reader, model, "variant"),
        prediction=reader.choice(model, "prediction", PREDICTIONS),
        scale=reader.number(latent, "scale"),
        beta_start=reader.number(schedule, "beta_start"),
        beta_end=reader.number(schedule, "beta_end"),
        timesteps=reader.whole(schedule, "timesteps"),
        image_size=side,
        pad=reader.whole(reader.part(model, "tokenizer"), "pad"),
        licence=_words(reader, model, "licence"),
    )


_BETAS = ("beta_start", "beta_end", "timesteps")
_UNET_NAMES = {
    "attention_ds": "attention_resolutions",
    "head_channels": "num_head_channels",
    "cross_only": "disable_self_attentions",
}


def _renamed(config: Params, names: Mapping[str, str]) -> Params:
    return {names.get(k, k): v for k, v in config.items() if v is not None and v != []}
