"""The peers and our own variants: by name, what runs them, with the settings that suit each best.

Everything that they need lies in one folder, the home, which envs.py and models.py fill:

    envs/<environment>/bin/python   made from the registry; <environment>.failed says why not
    models/<form>                   one checkpoint in the form that a peer reads
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine.errors import BackendUnavailable, UnknownName

HERE = Path(__file__).parent
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@dataclass(frozen=True)
class Peer:
    """environment  a name of envs.ENVIRONMENTS; None: this one
    worker       a script beside this file, or None for sdengine's own worker
    model        the form of the checkpoint that it reads: a name of models.FORMS
    options      what its worker's `load` takes beside the model's path
    settings     for the reader: how it was set, and why that is its best
    env          of the process, beside what is set already
    """

    settings: str
    environment: str | None
    worker: str | None
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def _diffusers(settings: str, **options: Any) -> Peer:
    return Peer(settings, "diffusers", "worker_diffusers.py", "diffusers", options)


def _genai(settings: str, model: str, **options: Any) -> Peer:
    return Peer(settings, "genai", "worker_genai.py", model, options)


def _sdcpp(settings: str, **options: Any) -> Peer:
    return Peer(settings, "sdcpp", "worker_sdcpp.py", "checkpoint", options)


def _ours(settings: str, request: Mapping[str, Any] = {}, **options: Any) -> Peer:
    return Peer(settings, None, None, "bundle", options, request)


PEERS: Mapping[str, Peer] = {
    "diffusers-f32": _diffusers(
        "float32, channels-last, both halves in one call; its default attention (SDPA)",
        dtype="float32",
    ),
    "diffusers-bf16": _diffusers(
        "bfloat16 weights and arithmetic, channels-last, SDPA", dtype="bfloat16"
    ),
    "diffusers-bf16-compiled": _diffusers(
        "bfloat16, channels-last, UNet and decoder through torch.compile with its inductor; "
        "compiled in the warm-up",
        dtype="bfloat16",
        compiled=True,
    ),
    "genai": _genai(
        "openvino-genai, reshaped to this size and batch before compiling; default precision "
        "(bfloat16 where the processor has it), weights exported as float16",
        "openvino",
    ),
    "genai-int8-weights": _genai(
        "the same; optimum-intel's 8-bit weights (`--weight-format int8`)", "openvino-int8-weights"
    ),
    "genai-int8-hybrid": _genai(
        "the same; optimum-intel's hybrid quantisation: UNet weights and activations in int8, "
        "calibrated on prompts; 8-bit weights elsewhere",
        "openvino-int8-hybrid",
    ),
    "genai-int8-full": _genai(
        "the same; optimum-intel's full quantisation of the UNet's weights and activations, "
        "calibrated on prompts",
        "openvino-int8-full",
    ),
    "sdcpp-f16": _sdcpp("stable-diffusion.cpp, float16 weights, flash attention", wtype="f16"),
    "sdcpp-q8_0": _sdcpp(
        "stable-diffusion.cpp, 8-bit weights in blocks (its fastest on processors with VNNI), "
        "flash attention",
        wtype="q8_0",
    ),
    "sdcpp-q4_0": _sdcpp("stable-diffusion.cpp, 4-bit weights, flash attention", wtype="q4_0"),
    "onnxruntime": _ours(
        "ONNX Runtime on our own graph, static shapes, all optimisations", backend="onnxruntime"
    ),
    "torch-f32": _ours("our own torch modules, eager, float32", backend="torch", precision="f32"),
}

OWN_WAY = {"steps": None, "sampler": None}  # a preset has both, where the request leaves them open

OURS: Mapping[str, Peer] = {
    "f32": _ours("OpenVINO, float32", backend="openvino", precision="f32"),
    "exact": _ours("OpenVINO, bfloat16, no caching", backend="openvino", precision="bf16"),
    "high": _ours("OpenVINO, int8, no caching", backend="openvino", precision="int8"),
    "balanced": _ours(
        "OpenVINO, int8, preset balanced as it is: its own sampler, steps and feature cache",
        {"preset": "balanced", **OWN_WAY},
        backend="openvino",
        precision="int8",
    ),
    "balanced-same-steps": _ours(
        "OpenVINO, int8, preset balanced's feature cache with the sampler and steps of the others",
        {"preset": "balanced"},
        backend="openvino",
        precision="int8",
    ),
    "balanced-bf16": _ours(
        "OpenVINO, bfloat16, preset balanced as it is: its own sampler, steps and feature cache",
        {"preset": "balanced", **OWN_WAY},
        backend="openvino",
        precision="bf16",
    ),
}


def find(names: Sequence[str], known: Mapping[str, Peer], kind: str) -> dict[str, Peer]:
    """Raises UnknownName."""
    for name in names:
        if name not in known:
            raise UnknownName(kind, name, known)
    return {name: known[name] for name in names}


def command(peer: Peer, home: Path) -> list[str]:
    """What starts its worker. Raises BackendUnavailable: its environment is not there, and why."""
    if peer.worker is None:
        return [sys.executable, "-m", "sdengine.bench.worker"]
    assert peer.environment is not None, "a script of a peer runs in the peer's environment"
    python = home / "envs" / peer.environment / SCRIPTS / "python"
    failed = home / "envs" / f"{peer.environment}.failed"
    if failed.exists() or not python.exists():
        why = f"could not be made: {_last(failed)}" if failed.exists() else "is not there"
        raise BackendUnavailable(
            f"its environment {peer.environment} {why}",
            hint=f"python -m sdengine.bench.peers.envs {home} {peer.environment}",
        )
    # -P: a script's own folder must not hide the libraries that it imports
    return [str(python), "-P", str(HERE / peer.worker)]


def options(peer: Peer, home: Path, bundle: str) -> dict[str, Any]:
    """What its worker's `load` takes. Raises BackendUnavailable: no model in its form."""
    if peer.model == "bundle":
        return {"model": bundle, **peer.options}
    path = home / "models" / peer.model
    found = path if path.exists() else next(iter(sorted(path.parent.glob(f"{peer.model}.*"))), None)
    if found is None or found.suffix == ".failed":
        why = "is not there" if found is None else f"could not be made: {_last(found)}"
        raise BackendUnavailable(
            f"the model in the form {peer.model!r} {why}",
            hint=f"python -m sdengine.bench.peers.models {home} CHECKPOINT {peer.model}",
        )
    return {"model": str(found), **peer.options}


def _last(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason was kept"
