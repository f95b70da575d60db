"""Comparing value by value: a graph damaged at one node is found out at that node."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import MissingPart, RequestError, UnknownName
from sdengine.export.compare import Way, compare, compared, parts_at, read_feeds, read_way
from sdengine.export.parity import distance
from sdengine.export.reduce import reduce
from sdengine.export.typed import write_typed

pytestmark = [pytest.mark.export, pytest.mark.ort, pytest.mark.ov]

F32, TYPED = Way("onnxruntime", "f32"), Way("trt", "f16")


@pytest.fixture
def typed_bundle(mini_bundle, tmp_path):
    """The mini bundle whose text encoder has typed graphs in float16."""
    shutil.copytree(mini_bundle, tmp_path / "mini")
    bundle = open_bundle(tmp_path / "mini")
    component = bundle.components["text_encoder"]
    network = write_typed(component, bundle.path, bundle.path, "f16").component
    changed = component.__class__(**{**vars(component), "typed": {"f16": network}})
    return bundle.__class__(**{**vars(bundle), "components": {"text_encoder": changed}})


def test_a_typed_graph_agrees_everywhere(typed_bundle):
    lines = compare(typed_bundle, "text_encoder", F32, TYPED)
    assert lines[-1].value == "last_hidden_state"
    assert len(lines) > 30
    assert min(line.psnr_db for line in lines) > 50
    assert parts_at(lines, 50) is None
    assert compare(typed_bundle, "text_encoder/full", F32, F32)[0].psnr_db == np.inf


def test_the_node_that_was_damaged_is_the_one_that_parts(typed_bundle):
    path = typed_bundle.components["text_encoder"].typed["f16"].graphs["full"].path
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Softmax" and "resblocks.1" in n.name)
    node.attribute[0].i = 2  # over the wrong axis
    onnx.save(model, path)
    found = parts_at(compare(typed_bundle, "text_encoder", F32, TYPED), 50)
    assert found is not None
    assert (found.value, found.op) == (node.output[0], "Softmax")


def test_other_engines_and_given_inputs(typed_bundle, tmp_path):
    np.savez(tmp_path / "inputs.npz", input_ids=np.arange(77)[None])
    given = read_feeds(tmp_path / "inputs.npz")
    lines = compare(typed_bundle, "text_encoder", F32, Way("openvino", "f32"), given)
    assert parts_at(lines, 80) is None
    assert lines[-1].max_abs > 0


def test_what_it_refuses(typed_bundle, tmp_path):
    assert read_way("openvino:bf16") == Way("openvino", "bf16")
    with pytest.raises(UnknownName, match="unknown way to compute a graph 'trt:f32'") as caught:
        read_way("trt:f32")
    assert "trt:f16" in caught.value.hint
    with pytest.raises(UnknownName, match="unknown component 'unett'"):
        compare(typed_bundle, "unett", F32, TYPED)
    with pytest.raises(UnknownName, match="unknown graph of text_encoder 'deep'"):
        compare(typed_bundle, "text_encoder/deep", F32, TYPED)
    with pytest.raises(MissingPart, match="no quantised network") as missing:
        compare(typed_bundle, "text_encoder", F32, Way("openvino", "int8"))
    assert "--precision int8" in missing.value.hint
    with pytest.raises(RequestError, match="the inputs lack input_ids") as lacking:
        compare(typed_bundle, "text_encoder", F32, TYPED, {})
    assert "--inputs" in lacking.value.hint
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="holds no inputs") as damaged:
        read_feeds(tmp_path / "no.npz")
    assert "inputs.npz" in damaged.value.hint


def test_the_node_that_parts_is_cut_out(typed_bundle, tmp_path):
    """It alone repeats the failure, on a session that knows nothing else; mended, it agrees."""
    path = typed_bundle.components["text_encoder"].typed["f16"].graphs["full"].path
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Softmax" and "resblocks.1" in n.name)
    node.attribute[0].i = 2
    onnx.save(model, path)
    folder = tmp_path / "small"
    between = "onnxruntime:f32,trt:f16"
    found = compared(typed_bundle, between, "text_encoder", None, 50.0, folder)
    assert found["parts_at"]["value"] == node.output[0]
    small = onnx.load(folder / "node.onnx")
    assert [n.op_type for n in small.graph.node] == ["Softmax", "Cast"]
    assert ran(small, folder) < 40
    small.graph.node[0].attribute[0].i = -1
    assert ran(small, folder) > 50


def test_a_product_is_cut_out_with_its_weight(typed_bundle, tmp_path):
    graph = typed_bundle.components["text_encoder"].typed["f16"].graphs["full"]
    nodes = onnx.load(graph.path, load_external_data=False).graph.node
    value = next(n.output[0] for n in nodes if n.op_type == "MatMul" and "mlp" in n.name)
    reduce(typed_bundle, "text_encoder", (F32, TYPED), value, tmp_path / "small")
    small = onnx.load(tmp_path / "small" / "node.onnx")
    assert small.graph.initializer
    assert {t.data_type for t in small.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert [n.op_type for n in small.graph.node].count("MatMul") == 1
    assert ran(small, tmp_path / "small") > 50


def ran(model, folder) -> float:
    """PSNR in dB of the small graph against what was wanted."""
    session = ort.InferenceSession(model.SerializeToString())
    with np.load(folder / "inputs.npz") as feeds, np.load(folder / "wanted.npz") as wanted:
        (found,) = session.run(None, dict(feeds))
        (expected,) = wanted.values()
    return distance(expected, found).psnr_db
