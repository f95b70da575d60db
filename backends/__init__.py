"""The runtime libraries, one file each, found by name. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from ..engine.errors import BackendUnavailable, UnknownName
from ..engine.ports import Backend, Probe

# Fastest first: `choose` takes the first that can run.
REGISTRY = {
    "openvino": "openvino:OpenVINO",
    "onnxruntime": "onnxruntime:OnnxRuntime",
    "ipex": "ipex:Ipex",
    "torch": "torch:Torch",
}
NAMES = tuple(REGISTRY)
# Asked for by name: none is proved on every machine that has a GPU.
GPU = {
    "torch-cuda": "torch_cuda:TorchCuda",
    "onnxruntime-cuda": "onnxruntime_cuda:OnnxRuntimeCuda",
    "onnxruntime-trt": "onnxruntime_cuda:OnnxRuntimeTensorRT",
    "trt": "tensorrt:TensorRT",
    "trt-rtx": "tensorrt:TensorRTRTX",
}
ALL = (*NAMES, *GPU)
# Known answers for tests; never chosen, never listed.
UNLISTED = {"fake": "fake:Fake"}


def get(name: str) -> Backend:
    """A backend by name. Raises UnknownName."""
    place = (REGISTRY | GPU | UNLISTED).get(name)
    if place is None:
        raise UnknownName("backend", name, ALL)
    module, _, attribute = place.partition(":")
    backend: Backend = getattr(importlib.import_module(f".{module}", __name__), attribute)()
    return backend


class Choice(NamedTuple):
    """A backend, what it can do here, and why it was taken."""

    backend: Backend
    probe: Probe
    reason: str


def choose(name: str | None = None, device: str | None = None) -> Choice:
    """The named backend, or for None and "auto" the fastest that can run, on a device or its own.

    raises  UnknownName; BackendUnavailable: the named one, or all of them, cannot run here
    """
    if name is not None and name != "auto":
        backend = get(name)
        probe = _probe(backend, device)
        if not probe.ok:
            raise _unavailable(name, probe)
        return Choice(backend, probe, f"asked for: {probe.reason}")
    refused: dict[str, Probe] = {}
    for candidate in NAMES:
        backend = get(candidate)
        probe = _probe(backend, device)
        if probe.ok:
            others = "".join(f"; not {n}: {p.reason}" for n, p in refused.items())
            return Choice(backend, probe, f"the fastest that can run: {probe.reason}{others}")
        refused[candidate] = probe
    mends = [p.mend for p in refused.values() if p.mend]
    raise BackendUnavailable(
        f"no backend can run here: {'; '.join(f'{n}: {p.reason}' for n, p in refused.items())}",
        hint=mends[0] if mends else "`sdengine doctor` says more",
    )


def _probe(backend: Backend, device: str | None) -> Probe:
    return backend.probe() if device is None else backend.probe_on(device)


def _unavailable(name: str, probe: Probe) -> BackendUnavailable:
    return BackendUnavailable(
        f"backend {name} cannot run here: {probe.reason}",
        hint=probe.mend if probe.mend else "`sdengine doctor` lists what can run",
    )
