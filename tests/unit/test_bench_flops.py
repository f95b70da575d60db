"""Operation counts against closed forms, and against shapes that OpenVINO found by itself."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest

from sdengine.bench import flops
from sdengine.engine.errors import MissingExtra, TraceError

pytestmark = pytest.mark.export

EMOJI = Path(__file__).parents[2] / "models" / "emoji"


@pytest.fixture
def saved(tmp_path):
    """`saved(nodes, inputs, output, weights) -> Path` of a one-graph model."""
    import onnx
    from onnx import TensorProto, helper

    def save(nodes, inputs, weights, opset=23):
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
        stored = [
            helper.make_tensor(n, TensorProto.FLOAT, s, [0.0] * prod(s)) for n, s in weights.items()
        ]
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "g", values, [out], stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        onnx.save(model, tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    return save


def node(op, inputs, **attributes):
    from onnx import helper

    return helper.make_node(op, inputs, ["y"], **attributes)


# operator, inputs, weights, attributes, dims, multiply-adds by hand
CASES = [
    ("MatMul", {"a": ["B", 5, 7]}, {"w": [7, 3]}, {}, {"B": 2}, 2 * 5 * 7 * 3),
    ("Gemm", {"a": [4, 6]}, {"w": [6, 5]}, {}, {}, 4 * 6 * 5),
    ("Gemm", {"a": [6, 4]}, {"w": [6, 5]}, {"transA": 1}, {}, 4 * 6 * 5),
    # 3x3 over 8x6 with padding: 48 places, 4 in, 10 out
    ("Conv", {"a": ["B", 4, "h", 6]}, {"w": [10, 4, 3, 3]}, {"pads": [1, 1, 1, 1]},
     {"B": 2, "h": 8}, 2 * 48 * 4 * 10 * 9),
    # stride 2: a quarter of the places; two groups: half of the inputs each
    ("Conv", {"a": [1, 4, 8, 8]}, {"w": [10, 2, 3, 3]},
     {"pads": [1, 1, 1, 1], "strides": [2, 2], "group": 2}, {}, 16 * 2 * 10 * 9),
    ("ConvTranspose", {"a": [1, 4, 8, 8]}, {"w": [4, 10, 2, 2]}, {"strides": [2, 2]}, {},
     64 * 4 * 10 * 4),
    # [B, H, n, d]: 3 x 2 heads, 5 queries, 7 keys of 8 numbers, values of 8
    ("Attention", {"a": [3, 2, 5, 8], "k": [3, 2, 7, 8], "v": [3, 2, 7, 8]}, {}, {}, {},
     3 * 2 * (5 * 7 * 8 + 5 * 7 * 8)),
    # the same, heads beside each other
    ("Attention", {"a": [3, 5, 16], "k": [3, 7, 16], "v": [3, 7, 16]}, {},
     {"q_num_heads": 2, "kv_num_heads": 2}, {}, 3 * 2 * (5 * 7 * 8 + 5 * 7 * 8)),
    ("Relu", {"a": [4, 6]}, {}, {}, {}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "weights", "attributes", "dims", "products"), CASES)
def test_operations_by_hand(saved, op, inputs, weights, attributes, dims, products):
    path = saved([node(op, [*inputs, *weights], **attributes)], inputs, weights)
    found = flops.count(path, dims)
    assert found.flop == 2 * products
    assert found.by_type == ({op: 2 * products} if products else {})


def by_openvino(path: Path, shapes: dict[str, list[int]]) -> int:
    """Counted over OpenVINO's own operators and shapes."""
    from sdengine.backends.openvino import library

    model = library().Core().read_model(path)
    model.reshape(shapes)
    total = 0
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in ("MatMul", "Convolution"):
            continue
        first, second = (list(op.input(i).get_partial_shape().to_shape()) for i in (0, 1))
        outputs = prod(op.output(0).get_partial_shape().to_shape())
        transposed = kind == "MatMul" and op.get_attributes()["transpose_a"]
        inner = first[-2 if transposed else -1] if kind == "MatMul" else prod(second[1:])
        total += 2 * inner * outputs
    return total


@pytest.mark.ov
@pytest.mark.parametrize(("batch", "side"), [(2, 16), (1, 24)])
def test_the_decoder_counts_as_openvino_sees_it(batch, side):
    path = EMOJI / "vae_decoder" / "full.onnx"
    found = flops.count(path, {"B": batch, "h": side, "w": side, "unused": 3})
    assert found.flop == by_openvino(path, {"latent": [batch, 4, side, side]})


def test_an_open_dimension_is_named():
    with pytest.raises(TraceError, match="'h'") as caught:
        flops.count(EMOJI / "vae_decoder" / "full.onnx", {"B": 1, "w": 16})
    assert "B=1, w=16" in caught.value.hint


def test_a_shape_that_hangs_on_data_is_refused(saved):
    """NonZero's rows cannot be known before it runs."""
    from onnx import helper

    nodes = [
        helper.make_node("NonZero", ["a"], ["z"]),
        helper.make_node("Cast", ["z"], ["f"], to=1),
        node("MatMul", ["w", "f"]),
    ]
    with pytest.raises(TraceError, match="at MatMul") as caught:
        flops.count(saved(nodes, {"a": [3, 3]}, {"w": [2, 2]}), {})
    assert "leave out the limit" in caught.value.hint


def test_without_onnx_ir_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingExtra, match="onnx_ir") as caught:
        flops.count(EMOJI / "vae_decoder" / "full.onnx", {})
    assert "pip install 'sdengine[export]'" in caught.value.hint
