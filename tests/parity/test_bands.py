"""The VAE cut at its norms, on torch: random networks of the f8 and the f4 layout in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdengine import backends
from sdengine.engine import bands as engine
from sdengine.engine.spec import Component, ComponentSpec, Graph, Profile, TensorSpec, bands_of
from sdengine.export.components import Part, band_spec
from sdengine.export.graphs import WEIGHTS
from sdengine.export.modules.bands import bands, normal
from sdengine.export.modules.vae import PREFIX, VAEConfig, VAEDecoder, VAEEncoder

pytestmark = pytest.mark.export

LAYOUTS = {"f8": (1, 2, 2, 4), "f4": (1, 2, 4)}
SPECS = {
    "vae_decoder": (VAEDecoder, "latent", 4, ("h", "w"), "image", 3, ("H", "W")),
    "vae_encoder": (VAEEncoder, "image", 3, ("H", "W"), "moments", 8, ("h", "w")),
}


def cut(kind, layout, folder):
    """(component without files of graphs, the network) of random weights."""
    make, taken, channels, sides, given, results, others = SPECS[kind]
    config = VAEConfig(ch=32, ch_mult=LAYOUTS[layout])
    torch.manual_seed(5)
    network = make(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if "norm" in name:  # fresh ones are ones and zeros, which would hide a wrong place
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    save_file({PREFIX + n: t for n, t in network.state_dict().items()}, folder / WEIGHTS)
    spec = ComponentSpec(
        kind,
        (TensorSpec(taken, "float32", ("B", channels, *sides)),),
        (TensorSpec(given, "float32", ("B", results, *others)),),
    )
    part = Part(spec, PREFIX, config.to_dict(), lambda: make(config), {}, bands=bands)
    specs = {"full": spec, **{b.name: band_spec(part, b) for b in bands(network)}}
    graphs = {n: Graph(n, folder / f"{n}.onnx", "", s.inputs, s.outputs) for n, s in specs.items()}
    return Component(spec, graphs, folder / WEIGHTS, "", config.to_dict(), key=kind), network


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SPECS)
def test_tiles_give_what_the_whole_gives(kind, layout, tmp_path, rng):
    component, network = cut(kind, layout, tmp_path)
    factor = 2 ** (len(LAYOUTS[layout]) - 1)
    scale = 1 if kind == "vae_decoder" else factor
    channels = component.spec.inputs[0].shape[1]
    # A quarter far brighter than the rest: no tile's statistics are those of the whole.
    given = rng.standard_normal((channels, 12 * scale, 20 * scale)).astype(np.float32)
    given[:, : 6 * scale, : 10 * scale] += 3
    with torch.inference_mode():
        whole = network(torch.from_numpy(given[None]))[0].numpy()
    session = backends.get("torch").load(component, Profile({}, "f32", 1))
    found = engine.run(lambda name, dims: session, kind, bands_of(component), given, 8, 12)
    session.close()
    assert found.shape == whole.shape
    assert 10 * np.log10(np.ptp(whole) ** 2 / np.mean((found - whole) ** 2)) >= 60


def test_a_norm_with_its_own_statistics_is_the_plain_norm(rng):
    norm = nn.GroupNorm(4, 12, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (rng.standard_normal((1, 12, 6, 8)) + 7).astype(np.float32)
    gathered = engine.Statistics()
    gathered.add(x[0])
    given = torch.from_numpy(gathered.grouped(4))
    found = normal(norm, torch.from_numpy(x), given)
    np.testing.assert_allclose(found, norm(torch.from_numpy(x)), atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_is_in_one_place_and_none_is_left_out(layout, tmp_path):
    """All bands together hold the network's parameters, and no band holds another's."""
    for kind in SPECS:
        _, network = cut(kind, layout, tmp_path)
        names = {id(p): n for n, p in network.named_parameters()}
        held = [
            {names[id(p)] for p in b.module.parameters()}
            for b in bands(network)
            if b.name != "inner"
        ]
        inner = next(b.module for b in bands(network) if b.name == "inner")
        assert set().union(*held) < set(names.values())
        assert {names[id(p)] for p in inner.parameters()} >= set(names.values()) - set().union(
            *held
        )
