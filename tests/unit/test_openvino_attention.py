"""A large attention in blocks of queries: against numpy in double precision."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.backends import devices
from sdengine.backends.openvino import library
from sdengine.backends.openvino_attention import split_queries

pytestmark = pytest.mark.ov
openvino = pytest.importorskip("openvino")

TOKENS, WIDTH, ROWS = 576, 32, 96
SCORES = 4 * TOKENS * 100  # room for 100 queries: 96 is the largest divisor below


def attention(tokens=TOKENS, heads=1, *, transposed=True):
    """As the exporter spells it: scaled queries, keys transposed by a node or by the product."""
    from openvino import opset13 as ops

    shape = openvino.PartialShape([1, heads, tokens, WIDTH])
    q, k, v = (ops.parameter(shape, openvino.Type.f32, name=n) for n in "qkv")
    turned = k if transposed else ops.transpose(k, ops.constant([0, 1, 3, 2]))
    scores = ops.matmul(q, turned, False, transposed)
    out = ops.matmul(ops.softmax(scores, -1), v, False, False)
    return openvino.Model([ops.result(out)], [q, k, v], "attention")


def run(model, feeds, precision="f32"):
    config = {"INFERENCE_PRECISION_HINT": precision}
    compiled = library().Core().compile_model(model, "CPU", config)
    return compiled(feeds)[0].astype(np.float64)


def kinds(model):
    return [node.get_type_name() for node in model.get_ops()]


@pytest.fixture(scope="module")
def feeds():
    random = np.random.default_rng(11)
    q, k, v = (random.standard_normal((1, 1, TOKENS, WIDTH)) for _ in range(3))
    return [x.astype(np.float32) for x in (q, k, v)]  # scores of deviation 6: peaked shares


@pytest.fixture(scope="module")
def wanted(feeds):
    q, k, v = (x[0, 0].astype(np.float64) for x in feeds)
    scores = q @ k.T
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return (shares / shares.sum(1, keepdims=True) @ v)[None, None]


@pytest.mark.parametrize("transposed", [True, False])
def test_it_gives_what_attention_is(transposed, feeds, wanted):
    model = attention(transposed=transposed)
    assert split_queries(model, SCORES) == 1
    assert "TensorIterator" in kinds(model)
    assert "Softmax" not in kinds(model)
    np.testing.assert_allclose(run(model, feeds), wanted, atol=2e-5)


def test_bfloat16_loses_little_more_than_in_one_piece(feeds, wanted):
    """Scores lie between the products in 8 bits, of 20 here; a decoder's are smaller by far."""
    if "bf16" not in devices.precisions(library().Core(), devices.CPU):
        pytest.skip("this processor has no bfloat16")
    blocks = attention()
    split_queries(blocks, SCORES)
    whole, split = (run(m, feeds, "bf16") - wanted for m in (attention(), blocks))
    assert np.std(split) < 2.5 * np.std(whole)
    assert np.std(split) < 0.03 * np.std(wanted)


@pytest.mark.parametrize(
    ("tokens", "scores", "rows"),
    [
        (TOKENS, SCORES, ROWS),
        (3 * 2048, 4 * 6144 * 6000, 1024),  # with more the scores leave the processor's caches
    ],
)
def test_a_block_is_a_divisor_of_all_queries(tokens, scores, rows):
    model = attention(tokens)
    split_queries(model, scores)
    (loop,) = (n for n in model.get_ops() if n.get_type_name() == "TensorIterator")
    assert loop.get_body().get_parameters()[0].get_shape()[2] == rows


@pytest.mark.parametrize(
    ("model", "scores"),
    [
        (attention(), 4 * TOKENS**2),  # all scores at once have room
        (attention(heads=2), SCORES),  # heads are small, and their kernel is good
        (attention(tokens=-1), SCORES),  # free: how many there will be is not known
        (attention(tokens=577), SCORES),  # a prime: one query a block would be slower
    ],
    ids=["small", "heads", "free", "prime"],
)
def test_others_stay_as_they_are(model, scores):
    assert split_queries(model, scores) == 0
    assert "Softmax" in kinds(model)


def test_the_result_keeps_its_name():
    """Graphs are asked for their outputs by name."""
    model = attention()
    model.outputs[0].set_names({"y"})
    split_queries(model, SCORES)
    assert model.outputs[0].names == {"y"}


def test_the_compiled_form_can_be_kept(feeds):
    """As the cache does: written, and read back by the next start."""
    model = attention()
    assert split_queries(model, SCORES) == 1
    core, config = library().Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", config)
    again = core.import_model(compiled.export_model(), "CPU", config)
    np.testing.assert_array_equal(again(feeds)[0], compiled(feeds)[0])
