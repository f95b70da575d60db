"""torch: the yardstick, as fast as torch is. The networks are those that the export traces.

Channels last, torch's own attention kernel, and in bfloat16 all of it: weights and arithmetic. With
$SDENGINE_TORCH=compile each graph goes through torch.compile in its first call: minutes for a
full-size network, a C++ compiler is needed, and docs/numerics.md says what it brings.

checked by  tests/contract/test_backends.py, tests/unit/test_backend_torch.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ..engine.errors import BackendError, CorruptPart
from ..engine.ports import Array, Probe
from ..engine.spec import Component, Graph, Precision, Profile, cut_of, is_band
from . import machine
from .base import Compiled, GraphBackend, Run, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

Answer = Callable[..., "dict[str, Tensor]"]


class Torch(GraphBackend):
    name = "torch"
    whole = True

    def __init__(self) -> None:
        # One network in memory for all its graphs and shapes.
        self._modules: WeakValueDictionary[tuple[str, ...], nn.Module] = WeakValueDictionary()

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
        reason = f"torch {torch.__version__} on CPU, {machine.threads()} threads"
        if _compiles():
            reason += ", through torch.compile"
        return Probe(True, reason, precisions=precisions(), speed=10)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> Compiled:
        import torch

        # One setting for the whole process: torch has no other.
        torch.set_num_threads(machine.threads() if profile.threads is None else profile.threads)
        key = (component.spec.name, str(component.weights), component.key, profile.precision)
        module = self._modules.get(key)
        if module is None:
            module = loaded(component, profile.precision)
            module = self._modules[key] = self.prepared(module, profile.precision)
        return TorchNetwork(self.answer(module, graph))

    def prepared(self, module: nn.Module, precision: Precision) -> nn.Module:
        """The network with its weights laid out for speed."""
        import torch

        # Convolutions take their layout from their weights: what flows between them follows.
        return module.to(memory_format=torch.channels_last)

    def answer(self, module: nn.Module, graph: Graph) -> Answer:
        """What runs for this graph: a function of its named tensors."""
        import torch

        found = plain_answer(module, graph)
        return torch.compile(found, dynamic=False) if _compiles() else found


def precisions() -> tuple[Precision, ...]:
    """What pays off in torch on this processor, fastest first."""
    fast = {"avx512_bf16", "amx_bf16"} & set(machine.processor().split())
    return ("bf16", "f32") if fast else ("f32",)


def _compiles() -> bool:
    return os.environ.get("SDENGINE_TORCH") == "compile"


def loaded(component: Component, precision: Precision) -> nn.Module:
    """The network with its weights. Raises BackendError, CorruptPart."""
    import torch
    from safetensors import safe_open

    prefix, build = _builder(component.spec.name)
    with torch.device("meta"):
        module = build(component.config)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(precision, torch.float32)
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
    return module.eval().requires_grad_(False)


class TorchNetwork:
    """What a module answers; the arguments are named as the component's inputs."""

    def __init__(self, answer: Answer) -> None:
        self._answer: Answer | None = answer

    def open(self, held: Mapping[str, Array]) -> Run:
        import torch

        from ..export.modules.ops import fused_attention

        assert self._answer is not None, "a closed network opens nothing"
        answer = self._answer
        fixed = {name: _tensor(value) for name, value in held.items()}

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            given = {name: _tensor(value) for name, value in feeds.items()}
            with torch.inference_mode(), fused_attention():
                results = answer(**fixed, **given)
            return {n: x.float().contiguous().numpy() for n, x in results.items()}

        return run

    def close(self) -> None:
        self._answer = None


def _tensor(value: Array) -> Tensor:
    """Shares memory where it can; pictures and features in the layout of the convolutions."""
    import torch

    # from_numpy warns about arrays that may not be written
    found = torch.from_numpy(value if value.flags.writeable else value.copy())
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found


def plain_answer(module: Any, graph: Graph) -> Answer:
    """What the module does for this graph, as a function of named tensors."""
    output, *further = (t.name for t in graph.outputs)
    kind = graph.name.partition("@")[0]

    def deep(**feeds: Tensor) -> dict[str, Tensor]:
        out, features = module.deep(**feeds, cuts=[cut_of(n) for n in further])
        return {output: out, **{n: features[cut_of(n)] for n in further}}

    def shallow(**feeds: Tensor) -> dict[str, Tensor]:
        cached = graph.inputs[-1].name
        features = feeds.pop(cached)
        return {output: module.shallow(**feeds, features=features, cut=cut_of(cached))}

    if is_band(kind):
        return _band(module, kind, [output, *further])
    if kind == "deep":
        return deep
    if kind.startswith("shallow"):
        return shallow
    return lambda **feeds: {output: module(**feeds)}


def _band(module: Any, name: str, outputs: list[str]) -> Answer:
    """A piece of the network, on the weights of the whole."""
    from ..export.modules.bands import bands

    band = next(b for b in bands(module) if b.name == name).module

    def answer(**feeds: Tensor) -> dict[str, Tensor]:
        made = band(**feeds)
        return dict(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))

    return answer


def _builder(component: str) -> tuple[str, Callable[[Mapping[str, Any]], nn.Module]]:
    """The prefix of a component's tensors, and what makes its module from `config`."""
    from ..export.modules import depth, image_encoder, text, unet, vae

    builders: dict[str, tuple[str, Callable[[Mapping[str, Any]], nn.Module]]] = {
        "text_encoder": (
            text.PREFIX,
            lambda c: text.TextEncoder(text.TextConfig.from_dict(dict(c))),
        ),
        "unet": (unet.PREFIX, lambda c: unet.UNet(unet.UNetConfig.from_dict(dict(c)))),
        "vae_encoder": (vae.PREFIX, lambda c: vae.VAEEncoder(vae.VAEConfig.from_dict(dict(c)))),
        "vae_decoder": (vae.PREFIX, lambda c: vae.VAEDecoder(vae.VAEConfig.from_dict(dict(c)))),
        "depth": (
            depth.PREFIX,
            lambda c: depth.DepthNetwork(depth.DepthConfig.from_dict(dict(c))),
        ),
        "image_encoder": (
            image_encoder.PREFIX,
            lambda c: image_encoder.ImageEncoder(image_encoder.ImageConfig.from_dict(dict(c))),
        ),
    }
    if component not in builders:
        raise BackendError(
            f"torch knows no network called {component!r}; it has {', '.join(builders)}",
            hint="another backend runs its graph: `sdengine doctor` lists them",
        )
    return builders[component]
