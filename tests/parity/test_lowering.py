"""Each operator's ONNX form against torch, run by ONNX Runtime at sizes it was not traced with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdengine.engine.errors import TraceError
from sdengine.engine.spec import ComponentSpec, TensorSpec
from sdengine.export.trace import trace

pytestmark = [pytest.mark.export, pytest.mark.ort]


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def interleave(x):
    value, gate = x.chunk(2, dim=1)
    return torch.cat([gate, value * 2 - 1], dim=1)


def split_heads(x):
    return x.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 2, 4).transpose(1, 2)


# name -> function of x [B, 8, h, w], shape of the result
FUNCTIONS = {
    "silu": (F.silu, ("B", 8, "h", "w")),
    "gelu": (F.gelu, ("B", 8, "h", "w")),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ("B", 8, "h", "w")),
    "softmax": (lambda x: x.softmax(dim=-1), ("B", 8, "h", "w")),
    "arithmetic": (
        lambda x: (x + 1.5) * (x - 2) / 3 + x.sin() - (x * 0).exp() * x.cos(),
        ("B", 8, "h", "w"),
    ),
    "chunk and cat": (interleave, ("B", 8, "h", "w")),
    "pad": (lambda x: F.pad(x, (0, 1, 2, 3)), ("B", 8, "h5", "w1")),
    "upsample": (
        lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        ("B", 8, "h2", "w2"),
    ),
    "heads": (split_heads, ("B", 2, "hw", 4)),
    "matmul": (lambda x: x.transpose(2, 3) @ x, ("B", 8, "w", "w")),
    "back to the shape": (lambda x: x.flatten(2).sin().reshape(x.shape), ("B", 8, "h", "w")),
    "computed size": (
        lambda x: x.reshape(x.shape[0] * 2, 4, x.shape[2], x.shape[3]),
        ("BB", 4, "h", "w"),
    ),
    "relu": (F.relu, ("B", 8, "h", "w")),
    "sigmoid": (torch.sigmoid, ("B", 8, "h", "w")),
    "max pool": (lambda x: F.max_pool2d(x, 2, 2), ("B", 8, "h_", "w_")),
    "bilinear, corners kept": (
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True),
        ("B", 8, "h2", "w2"),
    ),
    "bilinear, to a size": (
        lambda x: F.interpolate(x[:1], (x.shape[2] + x.shape[3], 2 * x.shape[3]), mode="bilinear"),
        (1, 8, "h_w", "w2"),
    ),
    "expand": (lambda x: x[:1, :, :1, :1].expand(x.shape[0], -1, 3, 1), ("B", 8, 3, 1)),
    "squeeze": (lambda x: x[:, 2:3].squeeze(1), ("B", "h", "w")),
    "layer norm without weights": (
        lambda x: F.layer_norm(x.transpose(1, 3), (8,), eps=1e-8),
        ("B", "w", "h", 8),
    ),
    "slice": (lambda x: x[:, 2:7, :, :], ("B", 5, "h", "w")),
    "unsqueeze": (lambda x: x[:, :, None, :, :] + x[:, :, None, :, :], ("B", 8, 1, "h", "w")),
}
MODULES = {
    "conv": (nn.Conv2d(8, 6, 3, stride=2, padding=1), ("B", 6, "h2", "w2")),
    "conv without bias": (nn.Conv2d(8, 6, (1, 3), bias=False, groups=2), ("B", 6, "h", "w_2")),
    "group norm": (nn.GroupNorm(4, 8, eps=1e-3), ("B", 8, "h", "w")),
    "linear": (nn.Sequential(Of(lambda x: x.transpose(1, 3)), nn.Linear(8, 5)), ("B", "w", "h", 5)),
    "linear without bias": (
        nn.Sequential(Of(lambda x: x.transpose(1, 3)), nn.Linear(8, 5, bias=False)),
        ("B", "w", "h", 5),
    ),
    "layer norm": (
        nn.Sequential(Of(lambda x: x.transpose(1, 3)), nn.LayerNorm(8, eps=1e-4)),
        ("B", "w", "h", 8),
    ),
}


def traced(module: nn.Module, shape, dtype="float32", inputs=("B", 8, "h", "w")):
    spec = ComponentSpec(
        "net", (TensorSpec("x", dtype, inputs),), (TensorSpec("y", "float32", shape),)
    )
    return trace(module.to("meta").eval(), spec, prefix="net.", multiples={"h": 2, "w": 2})


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_operator(name, batch):
    torch.manual_seed(0)
    function, shape = FUNCTIONS[name] if name in FUNCTIONS else MODULES[name]
    module = Of(function).to_empty(device="cpu")
    for p in module.parameters():
        nn.init.normal_(p)
    weights = {f"net.{k}": v.detach().clone().numpy() for k, v in module.state_dict().items()}
    x = torch.randn(batch, 8, 10, 6)
    with torch.no_grad():
        wanted = module(x).numpy()
    result = run(traced(module, shape), {"x": x.numpy(), **weights})
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=2e-5)


def test_embedding():
    module = Of(nn.Embedding(11, 4))
    weights = {"net.function.weight": module.function.weight.detach().clone().numpy()}
    ids = torch.tensor([[0, 10, 3]])
    with torch.no_grad():
        wanted = module(ids).numpy()
    model = traced(module, ("B", 3, 4), "int64", ("B", 3))
    assert np.array_equal(run(model, {"x": ids.numpy(), **weights}), wanted)


def test_group_norm_needs_no_function_body():
    """ONNX Runtime would expand GroupNormalization into some twenty nodes."""
    model = traced(Of(nn.GroupNorm(4, 8)), ("B", 8, "h", "w"))
    assert "GroupNormalization" not in {n.op_type for n in model.graph}


def test_operators_that_are_not_known_are_all_named():
    with pytest.raises(TraceError, match=r"aten\.cosh.*aten\.erf") as error:
        traced(Of(lambda x: torch.erf(torch.cosh(x))), ("B", 8, "h", "w"))
    assert "export/lowering.py" in error.value.hint
