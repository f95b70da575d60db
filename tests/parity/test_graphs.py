"""The passes change no number: bound weights are the file's, tidying and hoisting are exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdengine.engine.errors import TraceError
from sdengine.engine.weights import read_header
from sdengine.export.graph.hoist import hoist
from sdengine.export.graph.tidy import tidy
from sdengine.export.graph.tools import copy_of, save
from sdengine.export.graph.weights import bind_weights
from sdengine.export.record import loaded
from sdengine.export.weights_file import write_weights

pytestmark = [pytest.mark.export, pytest.mark.ort]

W = "weights.safetensors"


@pytest.fixture(scope="module")
def home(mini, mini_parts, tmp_path_factory):
    """A folder with the UNet's weights file; graphs are saved beside it."""
    folder = tmp_path_factory.mktemp("unet")
    write_weights(folder / W, [mini.tensors[n] for n in mini_parts["unet"].tensor_names()])
    return folder


@pytest.fixture(scope="module")
def bound(traced, home):
    return bind_weights(traced["unet"], read_header(home / W), location=W)


@pytest.fixture(scope="module")
def feeds():
    random = np.random.default_rng(3)
    return {
        "sample": random.standard_normal((2, 4, 6, 10), np.float32),
        "timestep": np.array([999, 0.5], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, 32), np.float32),
    }


def session(model: ir.Model, home, *, optimise: bool = True):
    import onnxruntime

    save(model, home / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(home / "optimised.onnx")
    return onnxruntime.InferenceSession(
        home / "graph.onnx", options, providers=["CPUExecutionProvider"]
    )


def run(model: ir.Model, home, feeds, *, optimise: bool = True) -> dict[str, np.ndarray]:
    loaded_graph = session(model, home, optimise=optimise)
    names = [v.name for v in model.graph.outputs]
    taken = {v.name for v in model.graph.inputs}
    values = loaded_graph.run(names, {n: x for n, x in feeds.items() if n in taken})
    return dict(zip(names, values, strict=True))


def test_bound_graph_is_the_torch_module(bound, home, feeds, mini_parts):
    """Reference: torch in float32 on the same float16 weights."""
    with loaded(mini_parts["unet"], home / W) as module, torch.no_grad():
        wanted = module(**{n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()
    found = run(bound, home, feeds)["out_sample"]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * wanted.std())


def test_bound_graph_holds_no_weights(bound, mini_parts):
    names = set(mini_parts["unet"].tensor_names())
    assert names <= bound.graph.initializers.keys()
    assert all(
        isinstance(bound.graph.initializers[n].const_value, ir.ExternalTensor) for n in names
    )
    assert [v.name for v in bound.graph.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert len(ir.to_proto(bound).SerializeToString()) < 400_000


def test_tidy_is_exact_and_smaller(bound, home, feeds):
    clean = tidy(bound)
    assert len(clean.graph) < len(bound.graph)
    assert sum(n.op_type == "Sigmoid" for n in clean.graph) < sum(
        n.op_type == "Sigmoid" for n in bound.graph
    )  # each residual block applies SiLU to the same time embedding
    before = run(bound, home, feeds, optimise=False)["out_sample"]
    after = run(clean, home, feeds, optimise=False)["out_sample"]
    assert np.array_equal(before, after)


def test_tidy_keeps_outputs_that_are_equal():
    """Two outputs may be the same computation: both names must stay."""
    x = ir.Value(name="x", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [ir.node("Sin", [x], name=n, outputs=[ir.Value(name=n)]) for n in ("one", "two")]
    outputs = [n.outputs[0] for n in nodes]
    graph = ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 21}, name="g")
    assert [v.name for v in tidy(ir.Model(graph, ir_version=10)).graph.outputs] == ["one", "two"]


def test_passes_leave_their_input_alone(bound):
    before = ir.to_proto(bound).SerializeToString(deterministic=True)
    tidy(bound)
    hoist(bound, ["encoder_hidden_states"])
    assert ir.to_proto(bound).SerializeToString(deterministic=True) == before


def test_hoisting_is_exact(bound, home, feeds):
    clean = tidy(bound)
    split = hoist(clean, ["encoder_hidden_states"])
    before = run(clean, home, feeds, optimise=False)["out_sample"]
    keys = run(split.prologue, home, feeds, optimise=False)
    after = run(split.rest, home, {**feeds, **keys}, optimise=False)["out_sample"]
    assert np.array_equal(before, after)


def test_hoisting_takes_products_and_nothing_that_belongs_to_the_attention(bound):
    split = hoist(tidy(bound), ["encoder_hidden_states"])
    arithmetic = [n.op_type for n in split.prologue.graph if n.op_type not in ("Cast", "Transpose")]
    assert arithmetic == ["MatMul"] * 8  # to_k and to_v of four transformers
    for value in split.prologue.graph.outputs:
        assert value.name.endswith((".attn2.to_k", ".attn2.to_v"))
        assert [str(d) for d in value.shape][:2] == ["B", "T"]
    assert "encoder_hidden_states" not in {v.name for v in split.rest.graph.inputs}
    shared = split.prologue.graph.initializers.keys() & split.rest.graph.initializers.keys()
    assert not [n for n in shared if n.startswith("model.")]


def test_nothing_to_hoist(traced):
    assert hoist(traced["vae_encoder"], ["moments"]) is None
    assert hoist(traced["vae_encoder"], []) is None


def test_cut_of_unknown_shape_is_refused():
    """NonZero's size depends on values: no engine could be told what to expect."""
    x, y = (
        ir.Value(name=n, shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.FLOAT))
        for n in ("text", "sample")
    )
    odd = ir.node("Custom", [x], domain="nowhere", name="odd", outputs=[ir.Value(name="odd")])
    add = ir.node("Add", [odd.outputs[0], y], name="sum", outputs=[ir.Value(name="sum")])
    graph = ir.Graph(
        [x, y], add.outputs, nodes=[odd, add], opset_imports={"": 21, "nowhere": 1}, name="g"
    )
    with pytest.raises(TraceError, match="odd, where the graph is cut") as error:
        hoist(ir.Model(graph, ir_version=10), ["text"])
    assert "shape inference" in error.value.hint


def test_engines_fold_casts_and_transpositions_of_weights(bound, home):
    """ONNX Runtime's optimised graph: no Cast or Transpose of a constant is left for each call."""
    import onnx

    session(tidy(bound), home)
    graph = onnx.load(home / "optimised.onnx", load_external_data=False).graph
    fixed = {t.name for t in graph.initializer}
    left = [n.name for n in graph.node if n.input and all(i in fixed for i in n.input)]
    assert not left
    assert not [n.name for n in graph.node if n.op_type == "Cast"]


@pytest.mark.ov
def test_openvino_folds_them_too(bound, home):
    """In its runtime graph no Convert or Transpose has a constant as its data."""
    import openvino

    save(tidy(bound), home / "graph.onnx")
    core = openvino.Core()
    model = core.read_model(home / "graph.onnx")
    model.reshape({"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 77, 32]})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def kind(node) -> str:
        return node.get_rt_info()["layerType"].astype(str)

    nodes = compiled.get_runtime_model().get_ordered_ops()
    moved = [n for n in nodes if kind(n) in ("Convert", "Transpose", "Reorder")]
    fed = [kind(n.input_value(0).get_node()) for n in moved]
    assert "Const" not in fed
    assert "Convert" not in {kind(n) for n in nodes}


def test_copies_share_nothing(bound):
    twin = copy_of(bound)
    next(iter(twin.graph)).name = "changed"
    assert next(iter(bound.graph)).name != "changed"
