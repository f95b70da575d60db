"""What this machine can run; for the rest, why not, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import StorageError
from ..engine.paths import cache_dir
from ..engine.ports import Probe
from . import ALL, get, limits, machine

Version = Callable[[str], str | None]

FLAGS = ("--threads", "--cores", "--numa-node", "--pin", "--hyper-threads")  # of `sdengine run`

PACKAGES = (
    "numpy",
    "Pillow",
    "typer",
    "rich",
    "ftfy",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "open_clip_torch",
    "nncf",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "intel-extension-for-pytorch",
)


@dataclass(frozen=True)
class Conflict:
    """Installed packages that cannot stand together."""

    what: str
    why: str
    mend: str


def installed(package: str) -> str | None:
    """Its version, with the build's mark: `2.13.0+cpu`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def conflicts(version: Version = installed) -> list[Conflict]:
    """Sets that pip lets you install and that then fail, often with an obscure error."""
    return [found for rule in _RULES for found in rule(version)]


def _openvino(version: Version) -> list[Conflict]:
    if version("openvino") is not None:
        return []
    why = "the default engine is a base dependency of sdengine"
    return [Conflict("openvino is not installed", why, "pip install openvino")]


def _two_onnxruntimes(version: Version) -> list[Conflict]:
    if version("onnxruntime") is None or version("onnxruntime-gpu") is None:
        return []
    return [
        Conflict(
            "onnxruntime and onnxruntime-gpu are both installed",
            "both write the folder `onnxruntime`: the one installed last wins, file by file",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    ]


def _torchvision(version: Version) -> list[Conflict]:
    """torchvision's compiled operators fit one build of torch; another fails at import."""
    torch, vision = version("torch"), version("torchvision")
    if torch is None or vision is None:
        return []
    # from torch 2.0 with torchvision 0.15 on, the second numbers have gone up together
    theirs, ours = _release(torch), _release(vision)
    paired = theirs[0] == 2 and ours[0] == 0 and ours[1] == theirs[1] + 15
    if paired and _build(torch) == _build(vision):
        return []
    return [
        Conflict(
            f"torch {torch} and torchvision {vision} do not belong together",
            "torchvision then fails at import: `operator torchvision::nms does not exist`",
            "pip install --upgrade --force-reinstall torch==2.14.1 torchvision==0.29.2",
        )
    ]


def _ipex(version: Version) -> list[Conflict]:
    torch, ipex = version("torch"), version("intel-extension-for-pytorch")
    if ipex is None or (torch is not None and _release(torch)[:2] == _release(ipex)[:2]):
        return []
    major, minor = _release(ipex)[:2]
    return [
        Conflict(
            f"intel-extension-for-pytorch {ipex} stands beside torch {torch}",
            f"it is compiled against torch {major}.{minor} and fails with any other",
            "python -m venv ipex && ipex/bin/pip install 'sdengine[ipex]'",
        )
    ]


_RULES = (_openvino, _two_onnxruntimes, _torchvision, _ipex)


def _release(version: str) -> tuple[int, int, int]:
    numbers = [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def _build(version: str) -> str:
    return version.partition("+")[2]


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows; plain JSON types."""
    probes = {name: get(name).probe() for name in ALL}
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "processor": processor(),
        "memory": memory(),
        "cache": cache(),
        "packages": {name: installed(name) for name in PACKAGES},
        "conflicts": [asdict(c) for c in conflicts()],
        "backends": {name: _backend(probe) for name, probe in probes.items()},
        "auto": first_able(probes),
    }


def processor(root: Path = Path("/")) -> dict[str, Any]:
    """What is there, and the plan of a run on it with its reasons."""
    plan = machine.plan(root)
    return {
        "name": machine.processor(root),
        "visible": os.cpu_count(),
        "threads": plan.threads,
        "extensions": machine.extensions(root),
        "plan": {**asdict(plan), "cpus": list(plan.cpus), "why": dict(plan.why)},
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `examine` found, for people."""
    python, processor, cache = found["python"], found["processor"], found["cache"]
    rows = [
        ("python", f"{python['version']} ({python['executable']})"),
        ("system", found["system"]),
        ("processor", processor["name"]),
        ("fast at", ", ".join(processor["extensions"])),
        ("memory", _memory_text(found["memory"])),
        ("cache", _cache_text(cache)),
    ]
    for name, text in rows:
        yield f"{name:<10} {text}"
    yield f"\nplan of a run ({', '.join(FLAGS)} change it)"
    for name, text in _plan_rows(processor):
        yield f"  {name:<9} {text}"
    yield "\nbackends"
    for name, probe in found["backends"].items():
        yield f"  {name:<12} {'yes' if probe['ok'] else 'no':<4} {probe['reason']}"
        if probe["ok"]:
            auto = ", what auto takes" if name == found["auto"] else ""
            yield f"{'':<20}in {', '.join(probe['precisions'])}{auto}"
        elif probe["mend"]:
            yield f"{'':<20}{probe['mend']}"
    yield "\npackages"
    for name, version in found["packages"].items():
        yield f"  {name:<28} {'-' if version is None else version}"
    for conflict in found["conflicts"]:
        yield f"\nwarning: {conflict['what']}"
        yield f"  {conflict['why']}"
        yield f"  {conflict['mend']}"


def _plan_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, why = found["plan"], found["plan"]["why"]
    doubled = ", hyper-threads too" if plan["hyper_threads"] else ""
    return [
        ("threads", f"{plan['threads']} of {found['visible']} visible{doubled}: {why['threads']}"),
        ("cores", why["cores"]),
        ("numa node", why["node"]),
        ("pinned", f"{'yes' if plan['pin'] else 'no'}: {why['pin']}"),
    ]


def _memory_text(found: Mapping[str, int | None]) -> str:
    return ", ".join(f"{_gigabytes(n)} {name}" for name, n in found.items() if n is not None)


def _cache_text(found: Mapping[str, Any]) -> str:
    if found["path"] is None:
        return f"none: {found['why']}"
    rights = "" if found["writable"] else ", not writable: results are not kept"
    used, free = _gigabytes(found["bytes"]), _gigabytes(found["free"])
    return f"{found['path']} ({used} used, {free} free{rights})"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def _backend(probe: Probe) -> dict[str, Any]:
    return {**asdict(probe), "precisions": list(probe.precisions)}


def first_able(probes: Mapping[str, Probe]) -> str | None:
    """What `--backend auto` takes of these, fastest first; None when nothing can run."""
    return next((name for name, probe in probes.items() if probe.ok), None)


def memory(root: Path = Path("/")) -> dict[str, int | None]:
    """Bytes, where the kernel tells: all, free for use, and the control group's limit."""
    return {
        "total": limits.meminfo(root).get("MemTotal"),
        "available": machine.available_memory(root),
        "limit": limits.memory_limit(root),
    }


def cache() -> dict[str, Any]:
    """Its folder, the bytes in it, the room on its disk, and whether it can be written."""
    try:
        folder = cache_dir()
    except StorageError as error:
        return {"path": None, "bytes": 0, "free": None, "writable": False, "why": error.message}
    standing = next(p for p in (folder, *folder.parents) if p.exists())
    return {
        "path": str(folder),
        "bytes": _bytes(folder),
        "free": shutil.disk_usage(standing).free,
        "writable": standing.is_dir() and os.access(standing, os.W_OK),
    }


def _bytes(folder: Path) -> int:
    """Sizes of all files below; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
