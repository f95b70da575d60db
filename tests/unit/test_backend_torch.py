"""torch and IPEX beside the contract: fast attention, the option to compile, what is not there."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from sdengine.backends import ipex as ipex_backend
from sdengine.backends.ipex import Ipex
from sdengine.backends.torch import Torch, plain_answer
from sdengine.engine.errors import BackendUnavailable
from sdengine.engine.spec import Graph, Profile, TensorSpec

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")


def test_fused_attention_is_softmax_of_scaled_scores(rng):
    """Against the formula in float64, in numpy."""
    from sdengine.export.modules.ops import attention, fused_attention

    heads, d = 3, 8
    q, k, v = (rng.normal(size=(2, n, heads * d)) for n in (10, 7, 7))

    def split(x):
        return x.reshape(2, -1, heads, d).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).transpose(0, 1, 3, 2) / np.sqrt(d)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = (weights @ split(v)).transpose(0, 2, 1, 3).reshape(2, 10, heads * d)
    given = [torch.from_numpy(x).float() for x in (q, k, v)]
    with fused_attention():
        found = attention(*given, heads)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_fused_attention_is_used_inside_alone(monkeypatch):
    from sdengine.export.modules import ops

    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        ops.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    x = torch.ones(1, 4, 8)
    with ops.fused_attention():
        ops.attention(x, x, x, 2)
        ops.attention(x, x, x, 2, bias=torch.zeros(4, 4))  # a bias keeps the plain spelling
    ops.attention(x, x, x, 2)
    assert calls == [1]


GRAPH = Graph("full", None, "", (TensorSpec("x", "float32", (2,)),),
              (TensorSpec("y", "float32", (2,)),))  # fmt: skip


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_compile_is_an_option(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled.append(k) or f)
    monkeypatch.delenv("SDENGINE_TORCH", raising=False)
    assert "compile" not in Torch().probe().reason
    Torch().answer(Double(), GRAPH)
    assert compiled == []
    monkeypatch.setenv("SDENGINE_TORCH", "compile")
    assert Torch().probe().reason.endswith("through torch.compile")
    answer = Torch().answer(Double(), GRAPH)
    assert compiled == [{"dynamic": False}]
    assert answer(x=torch.ones(2))["y"].tolist() == [2, 2]


def test_convolutions_are_laid_out_with_channels_last():
    module = Torch().prepared(torch.nn.Conv2d(4, 4, 3), "f32")
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_ipex_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", None)
    probe = Ipex().probe()
    assert not probe.ok
    assert probe.reason == "the package intel_extension_for_pytorch is not installed"
    assert "pip install '.[ipex]'" in probe.mend
    with pytest.raises(BackendUnavailable, match="ipex cannot run here") as caught:
        Ipex()._check(None, Profile())
    assert "pip install '.[ipex]'" in caught.value.hint


def test_ipex_beside_another_torch(monkeypatch):
    """Its import prints a line and ends the process."""

    class Finder:
        def find_spec(self, name, *_):
            if name == "intel_extension_for_pytorch":
                raise SystemExit(127)

    monkeypatch.delitem(sys.modules, "intel_extension_for_pytorch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    probe = Ipex().probe()
    assert (probe.ok, probe.reason) == (False, "it cannot be imported: 127")
    assert "torch 2.8" in probe.mend


@pytest.fixture
def ipex(monkeypatch):
    """A stand-in that packs nothing and notes what it was asked."""
    made = types.ModuleType("intel_extension_for_pytorch")
    made.__version__, made.asked = "2.8.0", []
    made.optimize = lambda module, **k: made.asked.append(k) or module
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", made)
    return made


def test_ipex_packs_for_the_precision(ipex):
    assert Ipex().probe().reason.startswith("IPEX 2.8.0, torch ")
    Ipex().prepared(torch.nn.Conv2d(4, 4, 3), "bf16")
    assert ipex.asked == [{"dtype": torch.bfloat16, "inplace": True}]


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.* is deprecated"
)  # newer torch says it of TorchScript
def test_ipex_traces_once_for_each_shape(ipex, monkeypatch):
    traced = []
    trace = torch.jit.trace
    monkeypatch.setattr(torch.jit, "trace", lambda *a, **k: traced.append(1) or trace(*a, **k))
    answer = Ipex().answer(Double(), GRAPH)
    plain = plain_answer(Double(), GRAPH)
    for size, count in ((2, 1), (2, 1), (3, 2), (2, 2)):
        x = torch.arange(size, dtype=torch.float32)
        with torch.inference_mode():
            assert answer(x=x)["y"].tolist() == plain(x=x)["y"].tolist()
        assert len(traced) == count


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(("limit", "times"), [(1 << 20, 1), (8, 0)])
def test_ipex_freezes_small_networks(limit, times, ipex, monkeypatch):
    frozen = []
    freeze = torch.jit.freeze
    monkeypatch.setattr(torch.jit, "freeze", lambda found: frozen.append(found) or freeze(found))
    monkeypatch.setattr(ipex_backend, "FROZEN", limit)
    module = Double()
    module.weight = torch.nn.Parameter(torch.ones(2))
    with torch.inference_mode():
        assert Ipex().answer(module, GRAPH)(x=torch.ones(2))["y"].tolist() == [2, 2]
    assert len(frozen) == times
