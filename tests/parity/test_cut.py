"""Cutting is exact, whatever a network takes; multiply-adds are those that torch counts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from sdengine import backends
from sdengine.engine.errors import TraceError
from sdengine.engine.hashes import sha256_of
from sdengine.engine.spec import ComponentSpec, Profile, TensorSpec
from sdengine.export.components import Part, _features, _labels
from sdengine.export.graph.count import multiply_adds
from sdengine.export.graph.cut import cut
from sdengine.export.graphs import WEIGHTS, Place, build_graphs
from sdengine.export.modules.unet import PREFIX, UNet, UNetConfig

pytestmark = [pytest.mark.export, pytest.mark.ort]

SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "context_dim": 32}
# A class label and further channels; a class vector. The plain network is in tests/contract.
CONFIGS = {
    "x4": {
        "in_channels": 7,
        "attention_ds": (1,),
        "head_channels": None,
        "num_heads": 4,
        "num_classes": 1000,
        "cross_only": (True, False),
    },
    "unclip": {
        "attention_ds": (1,),
        "head_channels": 16,
        "num_classes": "sequential",
        "adm_in_channels": 24,
    },
}
NATIVE = {"B": 1, "h": 8, "w": 4}


@pytest.fixture(scope="module", params=CONFIGS)
def built(request, tmp_path_factory):
    """(component, the torch network) of a small random UNet of this variant."""
    config = UNetConfig.from_dict({**SMALL, **CONFIGS[request.param]})
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    module = UNet(config).eval().requires_grad_(False)
    save_file({PREFIX + n: t for n, t in module.state_dict().items()}, folder / WEIGHTS)
    spec = ComponentSpec(
        "unet",
        (
            TensorSpec("sample", "float32", ("B", config.in_channels, "h", "w")),
            TensorSpec("timestep", "float32", ("B",)),
            TensorSpec("encoder_hidden_states", "float32", ("B", 77, 32)),
            *_labels(config),
        ),
        (TensorSpec("out_sample", "float32", ("B", 4, "h", "w")),),
    )
    part = Part(
        spec,
        PREFIX,
        config.to_dict(),
        lambda: UNet(config),
        {"h": 2, "w": 2},
        ("encoder_hidden_states",),
        _features(config, (0, 1)),
        NATIVE,
    )
    place = Place(folder, sha256_of(folder / WEIGHTS))
    return build_graphs(part, place, lambda component, stage: None), module


def feeds_of(component, batch=2, h=6, w=4, seed=0):
    random = np.random.default_rng(seed)
    feeds = {}
    for tensor in component.spec.inputs:
        shape = tensor.resolve({"B": batch, "h": h, "w": w})
        if tensor.dtype == "int64":
            feeds[tensor.name] = random.integers(0, 1000, shape)
        else:
            feeds[tensor.name] = random.standard_normal(shape).astype(np.float32)
    return feeds


def test_deep_and_shallow_are_the_network(built):
    """Reference: the torch module; what differs is the order of float32 sums."""
    component, module = built
    feeds = feeds_of(component)
    with torch.inference_mode():
        wanted = module(**{n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()
    session = backends.get("onnxruntime").load(component, Profile(threads=1))
    deep = session.graph("deep")(feeds)
    assert list(deep) == ["out_sample", "features0", "features1"]
    assert np.abs(deep["out_sample"] - wanted).max() <= 1e-4 * wanted.std()
    np.testing.assert_array_equal(session(feeds)["out_sample"], deep["out_sample"])
    for k in (0, 1):
        given = {**feeds, f"features{k}": deep[f"features{k}"]}
        found = session.graph(f"shallow{k}")(given)["out_sample"]
        assert np.abs(found - wanted).max() <= 1e-4 * wanted.std()
    session.close()


def test_the_torch_networks_own_methods_obey_the_same_law(built):
    component, module = built
    feeds = {n: torch.from_numpy(x) for n, x in feeds_of(component).items()}
    with torch.inference_mode():
        wanted = module(**feeds)
        out, features = module.deep(**feeds, cuts=(0, 1))
        assert torch.equal(out, wanted)
        for k in (0, 1):
            assert torch.equal(module.shallow(**feeds, features=features[k], cut=k), wanted)


def test_a_shallow_graph_takes_what_it_needs_and_no_more(built):
    component, _ = built
    taken = {n: [t.name for t in g.inputs] for n, g in component.graphs.items()}
    own = [t.name for t in component.spec.inputs if t.name != "encoder_hidden_states"]
    for k in (0, 1):
        names = taken[f"shallow{k}"]
        assert names[-1] == f"features{k}"
        assert set(own) <= set(names)
        assert set(names[:-1]) < set(taken["deep"])
    assert taken["deep"] == taken["full"]
    sizes = [component.graphs[n].path.stat().st_size for n in ("shallow0", "shallow1", "deep")]
    assert sizes == sorted(sizes)


def test_multiply_adds_are_those_that_torch_counts(built):
    """torch counts two operations for each, and the whole text too: once a prologue, here."""
    component, module = built
    feeds = {n: torch.from_numpy(x) for n, x in feeds_of(component, 1, 8, 4).items()}
    macs = {name: graph.macs for name, graph in component.graphs.items()}
    with torch.inference_mode():
        _, features = module.deep(**feeds, cuts=(0, 1))
        with FlopCounterMode(display=False) as counter:
            module(**feeds)
    assert macs["full"] + macs["prologue"] == counter.get_total_flops() // 2
    assert macs["deep"] == macs["full"]
    for k in (0, 1):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module.shallow(**feeds, features=features[k], cut=k)
        whole = counter.get_total_flops() // 2
        assert whole - macs["prologue"] <= macs[f"shallow{k}"] <= whole
        assert macs[f"shallow{k}"] < macs["full"]


def test_a_network_without_that_skip():
    x = ir.Value(name="x", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.FLOAT))
    sin = ir.node("Sin", [x], name="sin", outputs=[ir.Value(name="y")])
    model = ir.Model(
        ir.Graph([x], sin.outputs, nodes=[sin], opset_imports={"": 21}, name="g"), ir_version=10
    )
    assert cut(model, ()) == {}
    with pytest.raises(TraceError, match="g has 0 skips; features0 needs number 0") as caught:
        cut(model, [TensorSpec("features0", "float32", ("B", 4, "h", "w"))])
    assert "export/components.py" in caught.value.hint


def test_a_product_of_unknown_shape_is_not_guessed():
    a, b = (
        ir.Value(name=n, shape=ir.Shape(["K", "K"]), type=ir.TensorType(ir.DataType.FLOAT))
        for n in "ab"
    )
    product = ir.node("MatMul", [a, b], name="product", outputs=[ir.Value(name="y")])
    graph = ir.Graph([a, b], product.outputs, nodes=[product], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    assert multiply_adds(model, {"K": 5}) == 125
    with pytest.raises(TraceError, match="product: a has no known shape") as caught:
        multiply_adds(model, {})
    assert "shape inference" in caught.value.hint
