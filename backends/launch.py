"""The reference's launcher for Intel processors, without its package: what must be set before a
process starts. `again` sets what it finds, and starts the same command once more.

An allocator that keeps its pages, Intel's OpenMP, and memory on the node of the threads. Each only
where it is installed, and none of it where the user has set it. torch, IPEX and ONNX Runtime gain.
OpenVINO 2026.4 ends with "free(): invalid pointer" under another allocator, tcmalloc and jemalloc
both, when it compiles; so it is set for a backend that is asked for by name.

source      Stability-AI/stablediffusion, README, "Intel CPU": numactl, libjemalloc, intel-openmp,
            MALLOC_CONF; tcmalloc is what Intel's launcher prefers where both are there
checked by  tests/unit/test_backend_launch.py
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import UnknownName
from . import machine

NAMES = ("intel",)
TAKING = ("torch", "ipex", "onnxruntime")  # backends that run on another allocator
DONE = "SDENGINE_LAUNCHED"
# Pages stay with the process: each step asks for the same sizes again.
MALLOC_CONF = (
    "oversize_threshold:1,background_thread:true,metadata_thp:auto,"
    "dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000"
)
FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")


@dataclass(frozen=True)
class Launch:
    """env      variables to set
    prefix      words before the command
    said        one line for each thing: what is set, or what would bring it
    """

    env: Mapping[str, str]
    prefix: tuple[str, ...]
    said: tuple[str, ...]


def again(name: str, backend: str | None = None) -> list[str]:
    """Start this command once more with all of it set; this process ends there.

    backend  the one asked for; None: whichever is chosen
    returns  lines for the user, when there is nothing (more) to set
    raises   UnknownName
    """
    if name not in NAMES:
        raise UnknownName("launch", name, NAMES)
    if os.environ.get(DONE) == name:
        return []
    found = intel(os.environ, Path("/"), Path(sys.prefix), machine.plan(), backend)
    if not found.env and not found.prefix:
        return list(found.said)
    for line in found.said:
        sys.stderr.write(f"launch: {line}\n")
    sys.stderr.flush()
    command = [*found.prefix, sys.executable, *sys.orig_argv[1:]]
    os.execvpe(command[0], command, {**os.environ, **found.env, DONE: name})


def intel(
    env: Mapping[str, str],
    root: Path,
    prefix: Path,
    plan: machine.Plan,
    backend: str | None,
) -> Launch:
    """What is there to set. `root` and `prefix`: of the system and of this Python."""
    places = [prefix / "lib", *(root / folder for folder in FOLDERS)]
    made: dict[str, str] = {}
    preload: list[str] = []
    said: list[str] = []
    allocator = _library(places, ("libtcmalloc.so*", "libtcmalloc_minimal.so*", "libjemalloc.so*"))
    if "malloc" in env.get("LD_PRELOAD", ""):
        said.append("LD_PRELOAD has an allocator already")
    elif backend not in TAKING:
        said.append(f"no allocator, which OpenVINO breaks on: --backend {' or '.join(TAKING)}")
    elif allocator is None:
        said.append("no tcmalloc or jemalloc: apt-get install libjemalloc2")
    else:
        preload.append(str(allocator))
        if "jemalloc" in allocator.name and "MALLOC_CONF" not in env:
            made["MALLOC_CONF"] = MALLOC_CONF
        said.append(f"allocator {allocator}")
    openmp = _library(places, ("libiomp5.so",))
    if openmp is None:
        said.append("no libiomp5: pip install intel-openmp")
    elif "libiomp5" not in env.get("LD_PRELOAD", ""):
        preload.append(str(openmp))
        wanted = {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"}
        made |= {key: value for key, value in wanted.items() if key not in env}
        said.append(f"OpenMP {openmp}")
    if preload:
        before = [env["LD_PRELOAD"]] if env.get("LD_PRELOAD") else []
        made["LD_PRELOAD"] = ":".join([*preload, *before])
    if "OMP_NUM_THREADS" not in env:
        made["OMP_NUM_THREADS"] = str(plan.threads)
        said.append(f"{plan.threads} threads")
    words: tuple[str, ...] = ()
    if plan.confined:
        numactl = shutil.which("numactl", path=env.get("PATH"))
        if numactl is None:
            said.append("no numactl: apt-get install numactl")
        else:
            cpus = ",".join(map(str, plan.cpus))
            words = (numactl, f"--physcpubind={cpus}", "--localalloc")
            said.append(f"numactl on processors {cpus}")
    return Launch(made, words, tuple(said))


def _library(places: Iterable[Path], patterns: Iterable[str]) -> Path | None:
    """The first pattern that any place has; the shortest name of it."""
    folders = list(places)
    for pattern in patterns:
        for folder in folders:
            found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
            if found:
                return found[0]
    return None
