"""The table of a network's nodes: what is summed; that the executed graph is what is counted."""

from __future__ import annotations

import json

import pytest

from sdengine import api
from sdengine.bench import nodes
from sdengine.bench.nodes import Node
from sdengine.engine.bundle import open_bundle


def test_nodes_are_summed_by_kind_and_precision():
    found = nodes.sums(
        [
            Node("a", "Convolution", "i8", 0.3),
            Node("b", "Convolution", "i8", 0.2),
            Node("c", "Convolution", "bf16", 0.1),
            Node("d", "Subgraph", "f32", 0.05),
            Node("e", "Eltwise", "f32", 0.15),
            Node("f", "SomethingNew", "f32", 0.2),
            Node("input_blocks.1.1.transformer_blocks.0.attn1/MatMul_2", "Subgraph", "i8", 0.4),
        ]
    )
    table = [(s.kind, s.precision, s.nodes, round(s.seconds, 6), round(s.share, 6)) for s in found]
    assert table == [
        ("convolutions", "i8", 2, 0.5, 0.357143),
        ("attention", "i8", 1, 0.4, 0.285714),
        ("elementwise", "f32", 2, 0.2, 0.142857),
        ("rest", "f32", 1, 0.2, 0.142857),
        ("convolutions", "bf16", 1, 0.1, 0.071429),
    ]
    assert nodes.markdown(found).splitlines()[2] == "| convolutions | i8 | 2 | 500 | 35.7 % |"


def test_a_first_call_does_not_count_and_the_middle_does():
    given = iter([9.0, 3.0, 1.0, 2.0])
    found, _ = nodes.timed(lambda: [Node("a", "MVN", "f32", next(given))], 3)
    assert found == [Node("a", "MVN", "f32", 2.0)]


@pytest.mark.parametrize("paired", [True, False])
def test_rows_of_a_guided_step_are_twice_the_same(paired):
    graph = open_bundle(api.EMBEDDED["emoji"]).components["unet"].graphs["full"]
    feeds = nodes.feeds_of(graph, {"B": 4, "T": 77, "h": 8, "w": 8}, paired)
    assert [len(feed) for feed in feeds.values()] == [4] * len(graph.inputs)
    assert all((feed[:2] == feed[2:]).all() == paired for feed in feeds.values())
    assert not any((feed[0] == feed[1]).all() for feed in feeds.values())


@pytest.mark.ov
def test_the_embedded_network(tmp_path, capsys):
    pytest.importorskip("openvino")
    pytest.importorskip("onnx_ir")
    out = tmp_path / "nodes.json"
    options = ["--precision", "f32", "--size", "128x128", "--threads", "1", "--calls", "2"]
    assert nodes.main(["emoji", *options, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["paired"]
    kinds = {s["kind"]: s for s in content["sums"]}
    # one for each convolution and linear layer of the graph, whatever the engine fuses into it
    assert kinds["convolutions"]["nodes"] > 50
    assert kinds["linear layers"]["nodes"] > 50
    inside = sum(s["seconds"] for s in content["sums"])
    # Timed in other calls than the whole, perhaps on a busy machine; a wrong unit is off by 1000.
    assert 0.05 * content["call_s"] < inside < 20 * content["call_s"]
    assert "GFLOP/s" in capsys.readouterr().out
