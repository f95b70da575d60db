"""What tracing promises: the spec's names and shapes, readable names, no paths, the same twice."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import nn

from sdengine.engine.errors import TraceError
from sdengine.engine.spec import ComponentSpec, TensorSpec
from sdengine.export.trace import trace

pytestmark = pytest.mark.export


class Same(nn.Module):
    def forward(self, x):
        return x * 1


def spec(outputs=(("y", "float32", ("B", 3)),), inputs=(("x", "float32", ("B", 3)),)):
    return ComponentSpec(
        "net",
        tuple(TensorSpec(*t) for t in inputs),
        tuple(TensorSpec(*t) for t in outputs),
    )


def test_inputs_and_outputs_are_the_specs(traced, mini_parts):
    for name in mini_parts:
        model = traced[name]
        part = mini_parts[name]
        assert [v.name for v in model.graph.outputs] == [t.name for t in part.spec.outputs]
        found = {v.name: [str(d) for d in v.shape] for v in model.graph.inputs}
        for t in part.spec.inputs:
            assert found[t.name] == [str(d) for d in t.shape]
        assert found.keys() - {t.name for t in part.spec.inputs} == set(part.tensor_names())


def test_values_are_named_after_modules(traced):
    names = {v.name for node in traced["unet"].graph for v in node.outputs}
    assert {"middle_block.1.transformer_blocks.0.attn2.to_q", "time_embed.2"} <= names


def test_nothing_of_this_machine_is_in_the_graph(traced):
    for model in traced.values():
        raw = ir.to_proto(model).SerializeToString(deterministic=True)
        assert b".py" not in raw
        assert b"stack_trace" not in raw
        assert not any(n.metadata_props or n.doc_string for n in model.graph)


def test_two_traces_are_equal(traced, mini_parts):
    part = mini_parts["vae_encoder"]
    again = trace(part.empty(), part.spec, prefix=part.prefix, multiples=part.multiples)
    raw = [
        ir.to_proto(m).SerializeToString(deterministic=True) for m in (traced["vae_encoder"], again)
    ]
    assert raw[0] == raw[1]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            (("y", "float32", ("B", 4)),),
            r"y is torch.float32 \['\?', 3\], expected y: float32\[B, 4\]",
        ),
        ((("y", "int64", ("B", 3)),), "expected y: int64"),
        ((("y", "float32", ("B", 3)), ("z", "float32", ("B", 3))), "1 results, expected 2"),
    ],
)
def test_results_that_are_not_the_specs(outputs, message):
    with pytest.raises(TraceError, match=message) as error:
        trace(Same(), spec(outputs), prefix="", multiples={})
    assert "components.py" in error.value.hint


def test_input_names_that_are_not_the_modules():
    class Net(nn.Module):
        def forward(self, sample):
            return sample + 1

    with pytest.raises(TraceError, match=r"inputs \['sample'\], expected \['x'\]"):
        trace(Net(), spec(), prefix="", multiples={})


def test_module_that_branches_on_values():
    class Net(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else torch.sin(x)

    with pytest.raises(TraceError, match="torch cannot trace Net") as error:
        trace(Net(), spec(), prefix="", multiples={})
    assert "must not branch" in error.value.hint
