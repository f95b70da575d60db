"""torch, eager: the yardstick. The networks are those that the export traces, run as they are.

checked by  tests/contract/test_backends.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..engine.errors import BackendError, CorruptPart
from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Precision, Profile
from . import machine
from .base import GraphBackend, Run, first_line

if TYPE_CHECKING:
    from torch import nn


class Torch(GraphBackend):
    name = "torch"
    whole = True

    def probe(self) -> Probe:
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        mend = "pip install 'torch>=2.8' safetensors"
        try:
            import safetensors  # noqa: F401
            import torch
        except ModuleNotFoundError as error:
            return Probe(False, f"the package {error.name} is not installed", mend)
        except Exception as error:
            return Probe(False, f"torch cannot be imported: {first_line(error)}", mend)
        fast = {"avx512_bf16", "amx_bf16"} & set(machine.processor().split())
        precisions: tuple[Precision, ...] = ("bf16", "f32") if fast else ("f32",)
        reason = f"torch {torch.__version__} on CPU, {machine.threads()} threads"
        return Probe(True, reason, precisions=precisions, speed=10)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> TorchNetwork:
        import torch
        from safetensors import safe_open

        # One setting for the whole process: torch has no other.
        torch.set_num_threads(machine.threads() if profile.threads is None else profile.threads)
        prefix, build = _builder(component.spec.name)
        with torch.device("meta"):
            module = build(component.config)
        dtype = torch.bfloat16 if profile.precision == "bf16" else torch.float32
        names = {prefix + name: name for name in module.state_dict()}
        with safe_open(component.weights, framework="pt") as file:
            if missing := sorted(set(names) - set(file.keys())):
                raise CorruptPart(
                    f"{component.weights} lacks {len(missing)} tensors of {component.spec.name}: "
                    f"{', '.join(missing[:4])}",
                    hint="export the bundle again, or copy the file again from where it came",
                )
            weights = {short: file.get_tensor(long).to(dtype) for long, short in names.items()}
        module = module.to_empty(device="cpu")
        module.load_state_dict(weights, assign=True)
        return TorchNetwork(module.eval().requires_grad_(False), graph)


class TorchNetwork:
    """A module; its arguments are named as the component's inputs."""

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        self._module: nn.Module | None = module
        (self._output,) = (t.name for t in graph.outputs)

    def open(self, held: Mapping[str, Array]) -> Run:
        import torch

        module, output = self._module, self._output
        assert module is not None, "a closed network opens nothing"
        fixed = {name: torch.from_numpy(value) for name, value in held.items()}

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            # from_numpy shares memory, and warns about arrays that may not be written.
            given = {
                n: torch.from_numpy(v if v.flags.writeable else v.copy()) for n, v in feeds.items()
            }
            with torch.inference_mode():
                result = module(**fixed, **given)
            return {output: result.float().contiguous().numpy()}

        return run

    def close(self) -> None:
        self._module = None


def _builder(component: str) -> tuple[str, Callable[[Mapping[str, Any]], nn.Module]]:
    """The prefix of a component's tensors, and what makes its module from `config`."""
    from ..export.modules import text, unet, vae

    builders: dict[str, tuple[str, Callable[[Mapping[str, Any]], nn.Module]]] = {
        "text_encoder": (
            text.PREFIX,
            lambda c: text.TextEncoder(text.TextConfig.from_dict(dict(c))),
        ),
        "unet": (unet.PREFIX, lambda c: unet.UNet(unet.UNetConfig.from_dict(dict(c)))),
        "vae_encoder": (vae.PREFIX, lambda c: vae.VAEEncoder(vae.VAEConfig.from_dict(dict(c)))),
        "vae_decoder": (vae.PREFIX, lambda c: vae.VAEDecoder(vae.VAEConfig.from_dict(dict(c)))),
    }
    if component not in builders:
        raise BackendError(
            f"torch knows no network called {component!r}; it has {', '.join(builders)}",
            hint="another backend runs its graph: `sdengine doctor` lists them",
        )
    return builders[component]
