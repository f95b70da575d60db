"""torch on an NVIDIA GPU: half precision, channels last, flash attention, CUDA graphs.

The rung that other GPU engines are measured against, and what runs where none of them can. A
network is captured once for each set of shapes, on tensors of its own, and replayed for every
prompt; `denoiser` keeps the table on the GPU too. $SDENGINE_TORCH=compile puts torch.compile before
the capture; =eager leaves the capture out.

checked by  tests/unit/test_torch_cuda.py (on the processor, all but the capture itself),
            bench/gpu_visit.sh (there)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.errors import BackendUnavailable
from ..engine.ports import Array, Half, Handle, Job, Probe, Step
from ..engine.spec import Component, Graph, Precision, Profile
from ..engine.table import Row
from .base import Compiled, Run, first_line, kept_by
from .cuda.device import device_index
from .denoise import Rings, denoise, halves_of, slots_of
from .torch import Answer, Torch, loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("sdengine.backends")

MEND = "pip install 'torch>=2.8' safetensors, the build for CUDA, beside NVIDIA's driver"
WARM = 3  # calls before a capture: the libraries choose their algorithms in the first ones
NEVER = 2**31 - 1


class TorchCuda(Torch):
    """device      another than the GPU in tests: "cpu" """

    name = "torch-cuda"

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._fixed = device

    def probe_on(self, device: str) -> Probe:
        try:
            self._chosen(Profile(device=device))
        except BackendUnavailable as error:
            return Probe(False, error.message, error.hint)
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        try:
            import safetensors  # noqa: F401
            import torch
        except ModuleNotFoundError as error:
            return Probe(False, f"the package {error.name} is not installed", MEND)
        except Exception as error:
            return Probe(False, f"torch cannot be imported: {first_line(error)}", MEND)
        precisions: tuple[Precision, ...] = ("f16", "bf16", "f32")
        if self._fixed is not None:
            return Probe(True, f"torch on {self._fixed}", precisions=precisions, speed=40)
        if not torch.cuda.is_available():
            return Probe(False, f"torch {torch.__version__} finds no GPU", MEND)
        name = torch.cuda.get_device_name(0)
        reason = f"torch {torch.__version__} on {name}, {_mode()}"
        return Probe(True, reason, precisions=precisions, speed=40)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> Compiled:
        import torch

        self._place = torch.device(self._chosen(profile))
        weights, where = str(component.weights), str(self._place)
        key = (component.spec.name, weights, component.key, profile.precision, where)
        module = self._modules.get(key)
        if module is None:
            module = loaded(component, profile.precision)
            module = self._modules[key] = self.prepared(module, profile.precision)
        # The text encoder runs twice a picture and asks the host where its tokens end.
        captured = _mode() != "eager" and component.spec.name != "text_encoder"
        return TorchCudaNetwork(
            self.answer(module, graph), graph, self._place,
            captured=captured and self._place.type == "cuda", kept=kept_by(component, graph),
        )  # fmt: skip

    def prepared(self, module: nn.Module, precision: Precision) -> nn.Module:
        import torch

        if self._place.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes are few and come again
            torch.backends.cudnn.allow_tf32 = False  # f32 means float32
        return super().prepared(module.to(self._place), precision)

    def _chosen(self, profile: Profile) -> str:
        """`cuda:1` of the profile's device. Raises BackendUnavailable."""
        if self._fixed is not None:
            return self._fixed
        import torch

        index, count = device_index(profile.device), torch.cuda.device_count()
        if index >= count:
            raise BackendUnavailable(
                f"there is no cuda:{index}: torch sees {count} GPUs",
                hint="`nvidia-smi -L` lists them; CUDA_VISIBLE_DEVICES may hide some",
            )
        return f"cuda:{index}"

    def denoiser(self, job: Job) -> Iterator[Step] | None:
        """The whole table on the GPU: ports.Denoiser."""
        found = {key: getattr(session, "runner", None) for key, session in job.sessions.items()}
        runs = {key: r for key, r in found.items() if isinstance(r, TorchRun)}
        if not runs or len(runs) < len(found):
            return None
        return denoise(job, TorchBoard(job, runs))


class TorchCudaNetwork:
    """One graph of a network; shapes -> the captured call of them."""

    def __init__(
        self, answer: Answer, graph: Graph, place: torch.device, *, captured: bool,
        kept: frozenset[str],
    ) -> None:  # fmt: skip
        self._answer: Answer | None = answer
        self.graph, self.place, self._captured = graph, place, captured
        self.kept = kept
        self._calls: dict[tuple[tuple[str, tuple[int, ...]], ...], Call] = {}

    def open(self, held: Mapping[str, Array]) -> Run:
        import torch

        assert self._answer is not None, "a closed network opens nothing"
        fixed = {n: torch.from_numpy(np.asarray(v)).to(self.place) for n, v in held.items()}
        return TorchRun(self, fixed)

    def call(self, shapes: Mapping[str, tuple[int, ...]]) -> Call:
        """The one for these shapes of all inputs, made when it is first asked for."""
        assert self._answer is not None, "a closed network runs nothing"
        key = tuple(sorted(shapes.items()))
        if key not in self._calls:
            dtypes = {t.name: t.dtype for t in self.graph.inputs}
            self._calls[key] = Call(self._answer, shapes, dtypes, self.place, self._captured)
        return self._calls[key]

    def close(self) -> None:
        self._answer = None
        self._calls.clear()


class Call:
    """A network on tensors of its own: `inputs` are written, `run` gives the outputs, which the
    next run overwrites where the call is captured.

    user    whose held inputs lie in `inputs`
    """

    def __init__(
        self, answer: Answer, shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str], place: torch.device, captured: bool,
    ) -> None:  # fmt: skip
        import torch

        self._answer, self._left = answer, WARM if captured else -1
        self._place = place
        self._graph: Any = None
        self._outputs: dict[str, Tensor] = {}
        self.user: object = None
        self.inputs: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            dtype = torch.int64 if dtypes[name] == "int64" else torch.float32
            tensor = torch.zeros(shape, dtype=dtype, device=place)
            if len(shape) == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.inputs[name] = tensor

    def run(self) -> dict[str, Tensor]:
        if self._graph is not None:
            with self._here():
                self._graph.replay()
            return self._outputs
        if self._left == 0:
            self._capture()
            return self.run()
        self._left -= 1 if self._left > 0 else 0
        return self._once()

    def _once(self) -> dict[str, Tensor]:
        import torch

        from ..export.modules.ops import fused_attention

        with torch.inference_mode(), fused_attention():
            return {n: x.float() for n, x in self._answer(**self.inputs).items()}

    def _here(self) -> AbstractContextManager[Any]:
        """Captures and replays go to torch's current GPU, wherever their tensors lie."""
        import torch

        cuda = self._place.type == "cuda"
        return torch.cuda.device(self._place) if cuda else nullcontext()

    def _capture(self) -> None:
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            with self._here():
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    outputs = self._once()
        except RuntimeError as error:
            log.warning("a network cannot be captured, and runs as it is: %s", first_line(error))
            self._left = -1
            return
        self._graph, self._outputs = graph, outputs


class TorchRun:
    """A network with some inputs held on the GPU."""

    def __init__(self, network: TorchCudaNetwork, held: dict[str, Tensor]) -> None:
        self._network, self._held = network, held
        self.open_inputs = [t for t in network.graph.inputs if t.name not in held]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        call = self.ready({name: value.shape for name, value in feeds.items()})
        for name, value in feeds.items():
            if isinstance(value, TorchArray):
                call.inputs[name].copy_(value.tensor)
            else:
                call.inputs[name].copy_(torch.from_numpy(np.array(value, order="C")))
        results: dict[str, Any] = {}
        for name, tensor in call.run().items():
            own = tensor.clone() if name in self._network.kept else tensor.contiguous().cpu()
            results[name] = TorchArray(own) if name in self._network.kept else own.numpy().copy()
        return results

    def ready(self, shapes: Mapping[str, tuple[int, ...]]) -> Call:
        """The call for these shapes, with what is held in it."""
        held = {name: tuple(value.shape) for name, value in self._held.items()}
        call = self._network.call({**held, **shapes})
        if call.user is not self:
            for name, value in self._held.items():
                call.inputs[name].copy_(value)
            call.user = self
        return call


class TorchArray(Handle):
    """float32 on the GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> TorchArray:
        return TorchArray(self.tensor[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        fetched: Array = self.tensor.contiguous().cpu().numpy()
        return fetched.copy() if dtype is None else fetched.astype(dtype)


class TorchBoard:
    """A run's table in tensors: `denoise.Board`. Rows are enqueued on torch's current stream."""

    def __init__(self, job: Job, runs: Mapping[tuple[Half, str], TorchRun]) -> None:
        import torch

        self._job, self._runs = job, runs
        self.slots = slots_of(job.table)
        some = next(iter(runs.values()))
        self._place = some._network.place
        state, depth, size = job.start, job.table.depth, job.start.x.size
        rings = np.zeros((2, self.slots, size), np.float32)
        for past in range(max(0, state.rows - depth), state.rows):
            rings[0, past % self.slots] = state.history[past % depth]
            rings[1, past % self.slots] = state.history[depth + past % depth]
        rings[0, state.rows % self.slots] = state.x.ravel()
        self._rings = torch.from_numpy(rings).to(self._place)
        self._weights = torch.from_numpy(self._by_slot()).to(self._place)
        self._bad = torch.full((1,), NEVER, dtype=torch.int32, device=self._place)
        self._noise: Tensor | None = None
        self._deep: dict[Half, Tensor] = {}
        blend = job.blend
        self._blend = None if blend is None else [
            torch.from_numpy(np.array(np.broadcast_to(v, state.x.shape))).to(self._place)
            for v in (blend.mask, blend.latent, blend.noise)
        ]  # fmt: skip
        beside = job.channels
        self._channels = None if beside is None else torch.from_numpy(beside).to(self._place)

    def noise(self, values: Array) -> None:
        import torch

        staged = torch.from_numpy(np.array(values, np.float32))
        if self._place.type == "cuda":
            staged = staged.pin_memory()  # torch keeps it until the copy is done
        self._noise = staged.to(self._place, non_blocking=True)

    def row(self, row: Row) -> None:
        import torch

        job, i, slots = self._job, row.index, self.slots
        with torch.inference_mode():
            x = self._rings[0, i % slots].view(job.start.x.shape)
            answers = {half: self._ask(half, row, x) for half in halves_of(job, row)}
            if row.graph.startswith("deep"):
                self._deep = {half: found[1] for half, found in answers.items()}
            outs = [found[0] for found in answers.values()]
            if row.guidance != 1.0:
                uncond, cond = outs if len(outs) == 2 else outs[0].chunk(2)
                out = uncond + row.guidance * (cond - uncond)
            else:
                (out,) = outs
            finite = torch.isfinite(out).all()
            self._bad.copy_(torch.where(finite, self._bad, self._bad.clamp(max=i)))
            self._rings[1, i % slots] = out.reshape(-1)
            after = (self._weights[i] @ self._rings.view(2 * slots, -1)).view(x.shape)
            if job.table.n[i] != 0:
                assert self._noise is not None, "this row has noise"
                after = after + float(job.table.n[i]) * self._noise
            if self._blend is not None and job.blend is not None:
                mask, latent, noise = self._blend
                still = float(job.blend.alphas[i]) * latent + float(job.blend.sigmas[i]) * noise
                after = mask * after + (1 - mask) * still
            self._rings[0, (i + 1) % slots] = after.reshape(-1)

    def rings(self) -> Rings:
        xs, outs = self._rings.cpu().numpy().copy()
        bad = int(self._bad.item())
        return Rings(xs, outs, None if bad == NEVER else bad)

    def close(self) -> None:
        self._deep, self._runs = {}, {}

    def _ask(self, half: Half, row: Row, x: Tensor) -> tuple[Tensor, Any]:
        """(out, features by name) of one half, or of both in one call; results of their own."""
        run, copies = self._runs[half, row.graph], 2 if half == "both" else 1
        batch, channels, h, w = x.shape
        sizes = {"B": copies * batch, "h": h, "w": w}
        call = run.ready({t.name: t.resolve(sizes) for t in run.open_inputs})
        sample = call.inputs["sample"]
        for k in range(copies):
            rows = slice(k * batch, (k + 1) * batch)
            sample[rows, :channels].copy_(x)
            if self._channels is not None:
                sample[rows, channels:].copy_(self._channels)
        call.inputs["timestep"].fill_(row.t)
        for name in call.inputs:
            if name.startswith("features"):
                call.inputs[name].copy_(self._features(half, name, batch))
        results = dict(call.run())
        out = results.pop(run._network.graph.outputs[0].name)
        # the next call of the same graph, of the other half, writes over what was captured
        return out.clone(), {name: value.clone() for name, value in results.items()}

    def _features(self, half: Half, name: str, batch: int) -> Tensor:
        found: Any = self._deep
        if half in found:
            return found[half][name]  # type: ignore[no-any-return]
        return found["both"][name][batch:]  # type: ignore[no-any-return]

    def _by_slot(self) -> Array:
        """The table's weights by slot of the rings, not by age: [R, 2 * slots]."""
        table, slots = self._job.table, self.slots
        by_age = table.weights().astype(np.float32)
        depth = table.depth
        found = np.zeros((len(table), 2, slots), np.float32)
        for i in range(len(table)):
            for age in range(min(depth, i + 1)):
                found[i, :, (i - age) % slots] = by_age[i, [age, depth + age]]
        return found.reshape(len(table), 2 * slots)


def _mode() -> str:
    """How networks run: "graphs", "compile" (and graphs), "eager"."""
    asked = os.environ.get("SDENGINE_TORCH", "graphs")
    return asked if asked in ("compile", "eager") else "graphs"
