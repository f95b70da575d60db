"""What a variant has beside UNet, VAE and text tower: sizes, facts and statistics.

    depth         a depth network (MiDaS), which some files leave out: a depth map can be given
    x4-upscaler   a noise schedule of its own for the small picture
    unclip        an image tower, and, for unclip-l, the statistics of its embeddings: a file apart

source      reference-spec of Stable Diffusion 2, sections 1.9 to 1.11
checked by  tests/unit/checkpoint/test_companions.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.bundle import (
    STATISTICS,
    ImageConditioningFacts,
    LowScaleFacts,
    NoiseFacts,
    ScheduleFacts,
    Variant,
)
from ..engine.errors import BadConfig, NotACheckpoint, RequestError, TensorMismatch, UnknownFact
from .containers import TensorRef, file_kind, open_container
from .modules import depth, image_encoder
from .pickles import load_pickle
from .sizes import PASS_CONFIG, agree, count, shape_of

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

# CLIP's own, in RGB: Radford et al. 2021, the published preprocessing
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LEVEL = 350  # the highest that the x4 upscaler was trained with

UNCLIP = ("unclip-h", "unclip-l")
NEEDS_STATISTICS = "unclip-l"
_DEPTH, _IMAGE = depth.PREFIX, image_encoder.PREFIX
_HEADS = {"depth": {768: 12}, "image_encoder": {1280: 16, 1024: 16}}  # by width, as published


def companion_configs(
    shapes: Shapes, stated: Mapping[str, Mapping[str, Any]], variant: Variant
) -> dict[str, Config]:
    """ "depth" and "image_encoder": constructor arguments of those that this model has.

    stated      what a config says of either, under the same names
    raises      TensorMismatch when an unCLIP model has no image tower; UnknownFact, BadConfig
    """
    if variant == "depth" and any(name.startswith(_DEPTH) for name in shapes):
        return {"depth": depth_config(shapes, stated.get("depth", {}))}
    if variant in UNCLIP:
        if not any(name.startswith(_IMAGE) for name in shapes):
            raise TensorMismatch(
                f"the model is {variant}, and has no image tower ({_IMAGE}*): nothing could make "
                "its class vector",
                hint="give the whole model file, or the diffusers folder of a "
                "StableUnCLIPImg2ImgPipeline, which holds image_encoder",
            )
        tower = image_config(shapes, stated.get("image_encoder", {}), variant)
        vector = shape_of(shapes, "model.diffusion_model.label_emb.0.0.weight")[1]
        if vector != 2 * tower["embedding"]:
            raise TensorMismatch(
                f"the UNet takes a class vector of {vector}, and the image tower gives an "
                f"embedding of {tower['embedding']}; expected {vector // 2}",
                hint="the tower is of another model; give the files that belong together",
            )
        return {"image_encoder": tower}
    return {}


def depth_config(shapes: Shapes, stated: Mapping[str, Any]) -> Config:
    """Constructor arguments of `DepthConfig`. Raises TensorMismatch, UnknownFact, BadConfig."""
    backbone = _DEPTH + "pretrained.model."
    resnet = backbone + "patch_embed.backbone."
    stages = [f"{resnet}stages.{i}.blocks." for i in range(count(shapes, resnet + "stages."))]
    positions, width = shape_of(shapes, backbone + "pos_embed")[1:]
    found: Config = {
        "stem": shape_of(shapes, resnet + "stem.conv.weight")[0],
        "stages": [count(shapes, s) for s in stages],
        "channels": [shape_of(shapes, s + "0.conv3.weight")[0] for s in stages],
        "bottleneck": [shape_of(shapes, s + "0.conv1.weight")[0] for s in stages],
        "width": width,
        "layers": count(shapes, backbone + "blocks."),
        "grid": math.isqrt(positions - 1),
        "features": shape_of(shapes, _DEPTH + "scratch.layer1_rn.weight")[0],
    }
    agree("depth", found, stated)
    return found | {"heads": _heads("depth", width, stated), "hooks": [8, 11]}


def image_config(shapes: Shapes, stated: Mapping[str, Any], variant: str) -> Config:
    """Constructor arguments of `ImageConfig`. Raises as `depth_config`."""
    width, _, patch, _ = shape_of(shapes, _IMAGE + "conv1.weight")
    patches = shape_of(shapes, _IMAGE + "positional_embedding")[0] - 1
    found: Config = {
        "width": width,
        "layers": count(shapes, _IMAGE + "transformer.resblocks."),
        "patch": patch,
        "size": math.isqrt(patches) * patch,
        "embedding": shape_of(shapes, _IMAGE + "proj")[1],
    }
    agree("image_encoder", found, stated)
    usual = "quick_gelu" if variant == "unclip-l" else "gelu"
    activation = stated.get("activation", usual)
    if activation not in ("gelu", "quick_gelu"):
        raise BadConfig(
            f"image_encoder.activation: the config states {activation!r}, expected gelu or "
            "quick_gelu",
            hint=PASS_CONFIG,
        )
    heads = _heads("image_encoder", width, stated)
    return found | {"heads": heads, "activation": activation}


def _heads(part: str, width: int, stated: Mapping[str, Any]) -> int:
    heads = stated.get("heads")
    heads = _HEADS[part].get(width) if heads is None else heads
    if heads is None:
        raise UnknownFact(
            f"the attention heads of the {part} of width {width} are not in the file (known only "
            f"at width {', '.join(map(str, _HEADS[part]))})",
            hint=PASS_CONFIG,
        )
    if type(heads) is not int or heads < 1 or width % heads:
        raise BadConfig(
            f"{part}.heads: the config states {heads!r}, which does not divide {width}",
            hint=PASS_CONFIG,
        )
    return heads


# -- facts -------------------------------------------------------------------------------------


def low_scale_facts(
    schedule: ScheduleFacts, stated: Mapping[str, Any], timesteps: int
) -> LowScaleFacts:
    """Of the x4 upscaler. `schedule` was read as the model's own is; raises BadConfig."""
    level = stated.get("max_level")
    level = MAX_LEVEL if level is None else level
    if type(level) is not int or not 0 <= level < timesteps:
        raise BadConfig(
            f"the config states a highest noise level of {level!r}, expected 0 to {timesteps - 1}",
            hint=PASS_CONFIG,
        )
    return LowScaleFacts(schedule, level)


def image_facts(
    config: Mapping[str, Any], tensors: Mapping[str, TensorRef], timesteps: int | None
) -> ImageConditioningFacts:
    """Of unCLIP.

    tensors     the file's; statistics among them where there are any
    timesteps   as a config states them
    raises      UnknownFact when the file's own noise schedule follows another law
    """
    steps = 1000 if timesteps is None else timesteps
    buffer = tensors.get("noise_augmentor.betas")
    if buffer is not None:
        betas = buffer.torch().double().numpy()
        if not np.allclose(betas, squared_cosine(betas.size), rtol=2e-2, atol=1e-4):
            raise UnknownFact(
                "the noise of the image embedding follows a law that is not known here: "
                f"{betas.size} betas from {betas[0]:.6g} to {betas[-1]:.6g}",
                hint="unCLIP models of Stable Diffusion 2 have squaredcos_cap_v2; others are not "
                "supported",
            )
        steps = betas.size
    return ImageConditioningFacts(
        size=config["size"],
        mean=MEAN,
        std=STD,
        embedding=config["embedding"],
        noise=NoiseFacts("squaredcos_cap_v2", steps),
        statistics=STATISTICS[0] in tensors,
    )


def squared_cosine(timesteps: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """betas: float64 [timesteps]. Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17."""
    u = np.arange(timesteps + 1) / timesteps
    kept = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: np.ndarray[Any, np.dtype[np.float64]] = np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    return betas


# -- statistics of the embedding ---------------------------------------------------------------

_OPTION = "--embedding-stats FILE"
_WHAT = (
    f"pass {_OPTION}: Karlo's ViT-L-14_stats.th, or a .safetensors file with the vectors "
    "mean and std"
)


def with_statistics(
    path: Path, tensors: Mapping[str, TensorRef], variant: Variant, given: Path | None
) -> dict[str, TensorRef]:
    """The tensors, with the statistics of the embedding under the names of `STATISTICS`.

    given       the option's file; it goes over what the model brings along
    raises      UnknownFact when they are needed and not there; RequestError when the model has no
                use for them; NotACheckpoint, UnsafeCheckpoint, StorageError for a file that is none
    """
    result = dict(tensors)
    if given is not None:
        if variant not in UNCLIP:
            raise RequestError(
                f"{path} is a {variant} model, which has no embedding: {given} has no use",
                hint=f"leave {_OPTION} away; only unCLIP models take it",
            )
        width = tensors[_IMAGE + "proj"].shape[1]
        result |= read_statistics(given, width)
    elif variant == NEEDS_STATISTICS and not all(name in tensors for name in STATISTICS):
        raise UnknownFact(
            f"{path} is an unclip-l model: it noises its image embedding by the mean and the "
            "deviation of a data set, which lie in a file of their own",
            hint=_WHAT,
        )
    return result


def read_statistics(path: Path, width: int) -> dict[str, TensorRef]:
    """Mean and deviation, float32 [width], from a torch-pickled pair or a safetensors file.

    raises      NotACheckpoint, UnsafeCheckpoint, StorageError
    """
    if file_kind(path) == "safetensors":
        named = {n: r.torch() for n, r in open_container(path).tensors.items()}
        loaded: Any = [named.get("mean"), named.get("std")]
    else:
        loaded = load_pickle(path)
    pair = list(loaded) if isinstance(loaded, tuple | list) else []
    vectors = [v.detach().float().reshape(-1) for v in pair if isinstance(v, torch.Tensor)]
    if len(pair) != 2 or [v.numel() for v in vectors] != [width, width]:
        found = ", ".join(str(tuple(v.shape)) for v in pair if isinstance(v, torch.Tensor))
        raise NotACheckpoint(
            f"{path} holds no statistics of an embedding: expected two vectors of {width}, mean "
            f"and deviation, found {found if found else type(loaded).__name__}",
            hint=_WHAT,
        )
    if not all(bool(v.isfinite().all()) for v in vectors) or not bool((vectors[1] > 0).all()):
        raise NotACheckpoint(
            f"{path}: the deviations of an embedding are above 0, and all numbers finite; these "
            "are not",
            hint=_WHAT,
        )
    return {
        name: TensorRef(name, "F32", (width,), lambda v=v: v.view(torch.uint8).numpy())  # type: ignore[misc]
        for name, v in zip(STATISTICS, vectors, strict=True)
    }


def from_normalizer(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The vectors `mean` and `std` of a diffusers `image_normalizer`, [1, D]."""
    names = dict(zip(("mean", "std"), STATISTICS, strict=True))
    return {
        names.get(n, f"image_normalizer: {n}"): _vector(names.get(n, n), ref)
        for n, ref in tensors.items()
    }


def _vector(name: str, ref: TensorRef) -> TensorRef:
    """Flat and in float32, as statistics are kept."""

    def read() -> Any:
        return ref.torch().float().reshape(-1).contiguous().view(torch.uint8).numpy()

    return TensorRef(name, "F32", (math.prod(ref.shape),), read)
