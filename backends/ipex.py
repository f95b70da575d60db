"""Intel's extension for PyTorch on the processor: torch's networks, packed and traced.

It ended with version 2.8, which fits torch 2.8 alone: an environment of its own holds both
(`pip install '.[ipex]'`). Weights are packed for the processor once, and each graph becomes
TorchScript for the shapes of its first call, as in the reference's recipe (--ipex --torchscript).
Small networks are frozen, which packs weights for each script; large ones, where that gains
nothing and takes gigabytes that are not given back, are not (bench/results/README.md).

source      Stability-AI/stablediffusion, scripts/txt2img.py, the branches of --ipex, --torchscript
checked by  tests/contract/test_backends.py in that environment (CI_IPEX=1 .ci/run),
            tests/unit/test_backend_torch.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from ..engine.ports import Probe
from ..engine.spec import Graph, Precision
from . import machine
from .base import first_line
from .torch import Answer, Torch, plain_answer, precisions

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
FROZEN = 1 << 30  # bytes of weights; a UNet of Stable Diffusion 2 has 1.7e9 in bfloat16
MEND = "in an environment of its own, beside torch 2.8: pip install '.[ipex]'"


class Ipex(Torch):
    name = "ipex"

    @cached_property
    def _probe(self) -> Probe:
        try:
            import intel_extension_for_pytorch as ipex  # type: ignore[import-not-found]
            import safetensors  # noqa: F401
            import torch
        except ModuleNotFoundError as error:
            return Probe(False, f"the package {error.name} is not installed", MEND)
        except (Exception, SystemExit) as error:  # beside another torch it ends the process
            return Probe(False, f"it cannot be imported: {first_line(error)}", MEND)
        reason = f"IPEX {ipex.__version__}, torch {torch.__version__} on CPU"
        return Probe(
            True, f"{reason}, {machine.threads()} threads", precisions=precisions(), speed=15
        )

    def prepared(self, module: nn.Module, precision: Precision) -> nn.Module:
        import intel_extension_for_pytorch as ipex
        import torch

        # it advises its own torch.compile backend, which ended with it
        warnings.filterwarnings("ignore", message="JIT pass will be deprecated")
        module = super().prepared(module, precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        found: nn.Module = ipex.optimize(module, dtype=dtype, inplace=True)
        return found

    def answer(self, module: nn.Module, graph: Graph) -> Answer:
        plain = plain_answer(module, graph)
        outputs = [t.name for t in graph.outputs]
        scripts: dict[Shapes, Callable[..., tuple[Tensor, ...]]] = {}

        def traced(**feeds: Tensor) -> dict[str, Tensor]:
            feeds = dict(sorted(feeds.items()))  # held inputs come first, whichever they are
            shapes = tuple((name, tuple(value.shape)) for name, value in feeds.items())
            if shapes not in scripts:
                scripts[shapes] = _script(module, plain, feeds)
            return dict(zip(outputs, scripts[shapes](*feeds.values()), strict=True))

        return traced


def _script(
    network: nn.Module, answer: Answer, feeds: dict[str, Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """TorchScript of `answer` for the shapes of `feeds`; it takes their values in this order."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network  # its weights are parameters of the trace, not constants

        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return tuple(answer(**dict(zip(feeds, given, strict=True))).values())

    with torch.no_grad(), warnings.catch_warnings():
        # that sizes become constants: there is one script for each set of shapes
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        found = torch.jit.trace(  # type: ignore[no-untyped-call]
            Positional().eval(), tuple(feeds.values()), check_trace=False
        )
        small = sum(p.nbytes for p in network.parameters()) < FROZEN
        script: Callable[..., tuple[Tensor, ...]] = torch.jit.freeze(found) if small else found
        # The first run only watches; the second fuses, and gives other last bits. One seed must be
        # one picture, so the run that watches is not the caller's.
        script(*feeds.values())
    return script
