"""The networks as the tracer sees them: open sizes, a small vocabulary; and as a trainer does."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from sdengine.export.modules import text, unet, vae
from sdengine.export.modules.ops import Table, attention

pytestmark = pytest.mark.export

Inputs = tuple[Tensor, ...]
SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "context_dim": 32}
LATENT = {0: "B", 2: "h", 3: "w"}


def labels(batch: int) -> Tensor:
    return torch.arange(batch) * 7


def small_unet(**config: object) -> unet.UNet:
    facts = {**SMALL, "attention_ds": (1, 2), "head_channels": 16, **config}
    return unet.UNet(unet.UNetConfig.from_dict(facts))


# name -> module, inputs of a batch and a latent size, which axes are open
CASES: dict[str, tuple[nn.Module, Callable[[int, int, int], Inputs], list[dict[int, str]]]] = {
    "unet": (
        small_unet(),
        lambda b, h, w: (torch.randn(b, 4, h, w), torch.rand(b) * 999, torch.randn(b, 77, 32)),
        [LATENT, {0: "B"}, {0: "B"}],
    ),
    "unet_x4": (
        small_unet(
            in_channels=7,
            attention_ds=(1,),
            head_channels=None,
            num_heads=4,
            num_classes=1000,
            cross_only=(True, False),
        ),
        lambda b, h, w: (
            torch.randn(b, 7, h, w),
            torch.rand(b) * 999,
            torch.randn(b, 77, 32),
            labels(b),
        ),
        [LATENT, {0: "B"}, {0: "B"}, {0: "B"}],
    ),
    "unet_unclip": (
        small_unet(attention_ds=(), num_classes="sequential", adm_in_channels=24),
        lambda b, h, w: (
            torch.randn(b, 4, h, w),
            torch.rand(b) * 999,
            torch.randn(b, 77, 32),
            torch.randn(b, 24),
        ),
        [LATENT, {0: "B"}, {0: "B"}, {0: "B"}],
    ),
    "vae_encoder": (
        vae.VAEEncoder(vae.VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)),
        lambda b, h, w: (torch.randn(b, 3, 2 * h, 2 * w),),
        [LATENT],
    ),
    "vae_decoder": (
        vae.VAEDecoder(vae.VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)),
        lambda b, h, w: (torch.randn(b, 4, h, w),),
        [LATENT],
    ),
    "text": (
        text.TextEncoder(text.TextConfig(width=32, layers=2, heads=4, vocab_size=50)),
        lambda b, h, w: (torch.randint(50, (b, 77)),),
        [{0: "B"}],
    ),
}

# No casts, no copies, no pieces of a decomposed norm or softmax. Who adds an operator to a network
# adds it to export/lowering.py too.
VOCABULARY = {
    "aten.add.Tensor", "aten.cat.default", "aten.chunk.default", "aten.conv2d.default",
    "aten.cos.default", "aten.embedding.default", "aten.flatten.using_ints", "aten.gelu.default",
    "aten.group_norm.default", "aten.layer_norm.default", "aten.linear.default",
    "aten.matmul.default", "aten.mul.Tensor", "aten.pad.default", "aten.reshape.default",
    "aten.silu.default", "aten.sin.default", "aten.softmax.int", "aten.sym_size.int",
    "aten.transpose.int", "aten.unsqueeze.default", "aten.upsample_nearest2d.vec",
    "<built-in function getitem>", "<built-in function mul>",
}  # fmt: skip


@functools.cache
def traced(name: str, device: str = "cpu") -> ExportedProgram:
    module, make, axes = CASES[name]
    torch.manual_seed(0)
    # Latent sides are even, and say so: otherwise the skips of the UNet need not fit.
    dims = {"B": Dim("B"), "h": 2 * Dim("h_"), "w": 2 * Dim("w_")}
    shapes = tuple({axis: dims[dim] for axis, dim in open_.items()} for open_ in axes)
    example = tuple(x.to(device) for x in make(2, 4, 6))
    with torch.no_grad():
        return export(copy.deepcopy(module).eval().to(device), example, dynamic_shapes=shapes)


def calls(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", CASES)
def test_trace_keeps_sizes_open(name: str) -> None:
    """Other batches, sides that are not equal, and a deepest level one latent pixel wide."""
    module, make, _ = CASES[name]
    # torch guards against sizes of 1, of which its own strides depend; the graph does not.
    program = traced(name).module(check_guards=False)
    for size in [(2, 4, 6), (3, 8, 2), (1, 6, 10)]:
        inputs = make(*size)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), module.eval()(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_trace_has_a_small_vocabulary(name: str) -> None:
    assert set(calls(traced(name))) <= VOCABULARY


def test_trace_without_weights() -> None:
    """On the meta device nothing is allocated, and the graph is the same."""
    program = traced("unet", "meta")
    assert all(p.device.type == "meta" for p in program.parameters())
    assert calls(program) == calls(traced("unet"))


def test_class_labels_go_with_the_config() -> None:
    sample, timestep, context = CASES["unet"][1](1, 4, 4)
    with pytest.raises(ValueError, match="not taken"):
        CASES["unet"][0](sample, timestep, context, labels(1))
    with pytest.raises(ValueError, match="missing"):
        small_unet(num_classes=1000)(sample, timestep, context)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"use_linear_in_transformer": False}, "use_linear_in_transformer"),
        ({"transformer_depth": 10}, "transformer_depth"),
        ({"disable_middle_self_attn": True}, "disable_middle_self_attn"),
    ],
)
def test_other_unets_are_refused(facts: dict[str, object], message: str) -> None:
    ldm = {"use_spatial_transformer": True, "use_linear_in_transformer": True, **facts}
    with pytest.raises(ValueError, match=message):
        unet.UNetConfig.from_ldm(ldm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attention_in_every_dtype(dtype: torch.dtype) -> None:
    """Against torch's own, in float64; the float16 scores would overflow if scaled afterwards."""
    torch.manual_seed(0)
    d, heads = 64, 2
    q, k, v = (torch.randn(2, n, heads * d, dtype=torch.float64) for n in (5, 7, 7))
    q, k = q * 60, k * 60
    assert (q[..., :d] @ k[..., :d].transpose(1, 2)).abs().max() > torch.finfo(torch.float16).max
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q64, k64, v64 = (x.double().reshape(2, -1, heads, d).transpose(1, 2) for x in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(q64, k64, v64)
    expected = expected.transpose(1, 2).flatten(2)
    out = attention(q, k, v, heads)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-3}.get(dtype, 0.5)
    assert (out.double() - expected).abs().max() < tolerance


def test_table_keeps_its_values() -> None:
    """Through dtypes, copies, pickling and the meta device."""
    module = small_unet()
    values = module.frequencies().clone()
    with torch.device("meta"):
        lazy = small_unet()
    for other in [
        small_unet().double(),
        small_unet().half(),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        lazy.to_empty(device="cpu"),
    ]:
        assert torch.equal(other.frequencies(), values)
    assert not [name for name in module.state_dict() if "frequencies" in name]
    assert isinstance(module.frequencies, Table)


def test_it_trains_under_autocast() -> None:
    """Every parameter gets a finite gradient with bfloat16 autocast."""
    torch.manual_seed(0)
    module = small_unet()
    inputs = CASES["unet"][1](2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(*inputs).float().square().mean()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
