"""The table of components: what each network takes and gives, and how it is built.

checked by  tests/unit/test_export_components.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..engine.bundle import STATISTICS, ModelFacts
from ..engine.errors import ExportError
from ..engine.spec import ComponentSpec, TensorSpec, features_name
from .modules.bands import HALVES, Band, bands
from .modules.depth import MULTIPLE, DepthConfig, DepthNetwork
from .modules.depth import PREFIX as DEPTH
from .modules.image_encoder import PREFIX as IMAGE
from .modules.image_encoder import ImageConfig, ImageEncoder
from .modules.text import PREFIX as TEXT
from .modules.text import TextConfig, TextEncoder
from .modules.unet import PREFIX as UNET
from .modules.unet import UNet, UNetConfig
from .modules.vae import PREFIX as VAE
from .modules.vae import VAEConfig, VAEDecoder, VAEEncoder

Configs = Mapping[str, Mapping[str, Any]]


CUTS = (0,)  # each one more is a graph more to judge, and to compile


def _whole(network: nn.Module) -> Sequence[Band]:
    """Of a network that is not cut at its norms."""
    return ()


@dataclass(frozen=True)
class Part:
    """One network of a model.

    prefix      of its tensors' LDM names
    config      constructor arguments, plain JSON
    build       the module, on torch's current default device
    multiples   dimension -> what its size is a multiple of
    hoisted     inputs that stay the same for all steps of a run
    features    where the network can be cut: what `deep` gives and `shallow<k>` takes
    native      sizes of the step's named dimensions, for one picture of the model's own size
    beside      LDM names of tensors that lie in its weight file and are not the network's
    bands       the network cut at its norms, for tiles: a module's bands, in order
    """

    spec: ComponentSpec
    prefix: str
    config: Mapping[str, Any]
    build: Callable[[], nn.Module]
    multiples: Mapping[str, int]
    hoisted: tuple[str, ...] = ()
    features: tuple[TensorSpec, ...] = ()
    native: Mapping[str, int] | None = None
    beside: tuple[str, ...] = ()
    bands: Callable[[Any], Sequence[Band]] = _whole

    @property
    def name(self) -> str:
        return self.spec.name

    def empty(self) -> nn.Module:
        """The module without memory, to be traced or filled."""
        with torch.device("meta"):
            return self.build().eval().requires_grad_(False)

    def tensor_names(self) -> list[str]:
        """LDM names of all tensors of its weight file."""
        return [*(self.prefix + name for name in self.empty().state_dict()), *self.beside]


def parts(
    facts: ModelFacts, configs: Configs, cuts: Sequence[int] = CUTS, tiles: bool = True
) -> tuple[Part, ...]:
    """The networks of a model, in the order of the data: text, UNet, encoder, decoder, and the
    depth network or the image tower where `configs` has one.

    cuts        skips of the first level at which the UNet is cut for a feature cache
    tiles       whether the VAE is cut at its norms, for tiles without seams
    raises      ExportError for a cut that the UNet does not have
    """
    text = TextConfig.from_ldm(configs["text"])
    unet = UNetConfig.from_ldm(configs["unet"])
    vae = VAEConfig.from_ldm(configs["vae"])
    side, latent = facts.latent.factor, facts.latent.channels
    height, width = (s // side for s in facts.native_size)
    hidden = _floats("encoder_hidden_states", "B", "T", unet.context_dim)
    return (
        Part(
            ComponentSpec(
                "text_encoder",
                (TensorSpec("input_ids", "int64", ("B", text.context_length)),),
                (_floats("last_hidden_state", "B", text.context_length, text.width),),
            ),
            TEXT,
            text.to_dict(),
            lambda: TextEncoder(text),
            {},
        ),
        Part(
            ComponentSpec(
                "unet",
                (
                    _floats("sample", "B", unet.in_channels, "h", "w"),
                    _floats("timestep", "B"),
                    hidden,
                    *_labels(unet),
                ),
                (_floats("out_sample", "B", unet.out_channels, "h", "w"),),
            ),
            UNET,
            unet.to_dict(),
            lambda: UNet(unet),
            {"h": facts.latent.multiple, "w": facts.latent.multiple},
            hoisted=("encoder_hidden_states",),
            features=_features(unet, cuts),
            native={"B": 1, "T": text.context_length, "h": height, "w": width},
        ),
        Part(
            ComponentSpec(
                "vae_encoder",
                (_floats("image", "B", vae.in_channels, "H", "W"),),
                (_floats("moments", "B", 2 * vae.embed_dim, "h", "w"),),
            ),
            VAE,
            vae.to_dict(),
            lambda: VAEEncoder(vae),
            {"H": side, "W": side},
            bands=bands if tiles else _whole,
        ),
        Part(
            ComponentSpec(
                "vae_decoder",
                (_floats("latent", "B", latent, "h", "w"),),
                (_floats("image", "B", vae.out_ch, "H", "W"),),
            ),
            VAE,
            vae.to_dict(),
            lambda: VAEDecoder(vae),
            {},
            bands=bands if tiles else _whole,
        ),
        *_companions(facts, configs),
    )


def band_spec(part: Part, band: Band) -> ComponentSpec:
    """What a band's graph takes and gives. Its maps' sides are called as those of the component's
    own input, and what it gives in another size as those of its output."""
    sides = part.spec.inputs[0].shape[2:]
    others = part.spec.outputs[0].shape[2:] if band.times != 1 else sides
    given = (_floats(n, "B", c, *sides) for n, c in band.given.items())
    statistics = [_floats("statistics", "B", band.groups, HALVES)] if band.groups else []
    made = (_floats(n, "B", c, *others) for n, c in band.made.items())
    name = f"{part.name}.{band.name}"  # of the traced graph: a session has its component's
    return ComponentSpec(name, (*given, *statistics), tuple(made))


def _companions(facts: ModelFacts, configs: Configs) -> Iterator[Part]:
    if "depth" in configs:
        depth = DepthConfig.from_dict(configs["depth"])
        yield Part(
            ComponentSpec(
                "depth", (_floats("image", "B", 3, "H", "W"),), (_floats("depth", "B", "H", "W"),)
            ),
            DEPTH,
            depth.to_dict(),
            lambda: DepthNetwork(depth),
            {"H": MULTIPLE, "W": MULTIPLE},
        )
    if "image_encoder" in configs:
        image = ImageConfig.from_dict(configs["image_encoder"])
        conditioning = facts.image_conditioning
        yield Part(
            ComponentSpec(
                "image_encoder",
                (_floats("pixels", "B", 3, image.size, image.size),),
                (_floats("embedding", "B", image.embedding),),
            ),
            IMAGE,
            image.to_dict(),
            lambda: ImageEncoder(image),
            {},
            beside=STATISTICS if conditioning is not None and conditioning.statistics else (),
        )


def _floats(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _features(unet: UNetConfig, cuts: Sequence[int]) -> tuple[TensorSpec, ...]:
    """Of skips of the first level: deeper ones would spare a step next to nothing.

    What meets the innermost of them comes up from the second level, and is as wide as that.
    """
    last = unet.num_res_blocks
    level = [0] * last + [min(1, len(unet.channel_mult) - 1)]
    widths = [unet.model_channels * unet.channel_mult[i] for i in level]
    if odd := [k for k in cuts if not 0 <= k < len(widths)]:
        raise ExportError(
            f"this UNet has no skip {odd[0]} in its first level to be cut at",
            hint=f"give cuts of 0 to {len(widths) - 1}; 0 is the cheapest to run",
        )
    return tuple(_floats(features_name(k), "B", widths[k], "h", "w") for k in sorted(set(cuts)))


def _labels(unet: UNetConfig) -> tuple[TensorSpec, ...]:
    if unet.num_classes is None:
        return ()
    if unet.num_classes == "sequential":
        assert unet.adm_in_channels is not None, "see UNetConfig.__post_init__"
        return (_floats("class_labels", "B", unet.adm_in_channels),)
    return (TensorSpec("class_labels", "int64", ("B",)),)
