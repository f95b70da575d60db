"""eps or v, asked of the network itself.

source      AUTOMATIC1111's probe, as section 2.6 of the reference-spec of Stable Diffusion 2 has it
checked by  tests/unit/checkpoint/test_facts.py, on UNets whose answer is set by hand
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..engine.bundle import Prediction
from .containers import TensorRef
from .modules.unet import PREFIX, UNet, UNetConfig


def probe(tensors: Mapping[str, TensorRef], unet: Mapping[str, Any]) -> tuple[Prediction, float]:
    """The prediction type, and the mean of output - input that it was read from.

    At the last time step the input is nearly all noise: a network that predicts the noise gives
    about its input back, one that predicts v gives minus the picture, far below it. One pass in
    float32 on an 8x8 latent; memory for one float32 copy of the weights.
    """
    config = UNetConfig.from_ldm(unet)
    with torch.device("meta"):
        network = UNet(config)
    network.to_empty(device="cpu")  # the computed tables are made anew; weights come next
    names = list(network.state_dict())
    state = {name: tensors[PREFIX + name].torch().float() for name in names}
    network.load_state_dict(state, assign=True)
    x = torch.full((1, config.in_channels, 8, 8), 0.5)
    context = torch.full((1, 2, config.context_dim), 0.5)
    with torch.inference_mode():
        out = network.eval()(x, torch.tensor([999.0]), context)
    shift = float((out - x[:, : config.out_channels]).mean())
    return ("v" if shift < -1 else "eps"), shift
