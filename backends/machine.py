"""What a run takes of this machine: threads, the cores they run on, and why.

`plan` decides, from /proc and /sys alone; `settle` carries out the part of it that no engine's
option can say: the thread that loads, and so every thread that an engine starts from it, stays on
the chosen cores. Memory that they touch first is then their own node's.

checked by  tests/unit/test_machine_plan.py (other machines, as trees), test_backend_machine.py
"""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from ..engine.errors import RequestError, UnknownName
from . import topology
from .limits import available_memory, memory_limit, quota, read
from .topology import Core, spelled

__all__ = ["Plan", "Wish", "available_memory", "memory_limit", "plan", "processor", "threads"]

log = logging.getLogger("sdengine.backends")

Kind = Literal["fast", "all"]
KINDS: tuple[str, ...] = ("fast", "all")
ALL = "all"
# Slow cores are taken beside fast ones only where they are sure to gain.
GAIN = 1.1
ROOT = Path("/")


@dataclass(frozen=True)
class Wish:
    """What the user asks for; None leaves it to the plan.

    threads         processor threads, 1 or more
    pin             each thread stays on one core
    node            the number of a NUMA node, or "all"
    cores           "fast" or "all", where a processor has two kinds
    hyper_threads   one thread for each processor, not for each core
    """

    threads: int | None = None
    pin: bool | None = None
    node: str | None = None
    cores: str | None = None
    hyper_threads: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    cpus        processors for the threads: all of ours, or those of the chosen cores
    confined    whether `cpus` are fewer than we may use
    fast_only   whether slow cores of a mixed processor are left out; None: it has one kind
    why         choice -> reason, for people
    """

    threads: int
    cpus: tuple[int, ...]
    confined: bool
    pin: bool
    hyper_threads: bool
    fast_only: bool | None
    why: Mapping[str, str]


def plan(root: Path = ROOT, wish: Wish = Wish()) -> Plan:
    """Threads, cores and pinning for a run on this machine.

    raises  RequestError, UnknownName: what is wished for is not there
    """
    allowed = _allowed()
    ours = topology.cores(root, allowed)
    near, why_node = _near(ours, wish.node)
    chosen, why_cores = _worth(near, wish.cores)
    double = wish.hyper_threads is True
    threads, why_threads = _threads(root, chosen, double, wish.threads)
    why = {"threads": why_threads, "cores": why_cores, "node": why_node}
    if threads > _places(chosen, double) and wish.node is None and wish.cores is None:
        # the cores that were left out are better than two threads on one
        chosen = ours
        why |= dict.fromkeys(("cores", "node"), f"all: {threads} threads were asked for")
    if threads > _places(chosen, double) and wish.hyper_threads is None:
        double = True
    places = _places(chosen, double)
    pin, why["pin"] = _pin(root, allowed, threads, places, wish.pin)
    cpus = tuple(sorted(cpu for core in chosen for cpu in core.cpus))
    mixed = len({core.capacity for core in ours}) > 1
    slowest = min(core.capacity for core in ours)
    fast_only = all(core.capacity > slowest for core in chosen) if mixed else None
    return Plan(threads, cpus, len(chosen) < len(ours), pin, double, fast_only, why)


def threads(root: Path = ROOT) -> int:
    """The plan's threads: what a backend takes that was told none."""
    return plan(root).threads


def places(count: int, root: Path = ROOT) -> list[int]:
    """Processors for `count` pinned threads, of different cores first; empty where they are fewer
    than the threads."""
    ours = topology.cores(root, topology.affinity())
    layers = zip_longest(*(core.cpus for core in ours))
    found = [cpu for layer in layers for cpu in layer if cpu is not None]
    return found[:count] if len(found) >= count else []


def settle(chosen: Plan) -> None:
    """Keep this thread, and those it starts from now on, on the plan's processors.

    Only where the plan leaves some out: a NUMA node among several, fast cores among slow ones; or
    where an earlier plan of this process did, and this one takes them in again.
    """
    now, allowed = topology.affinity(), _allowed()
    if not (chosen.confined or now != allowed) or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, chosen.cpus)
        _BEFORE[frozenset(chosen.cpus)] = allowed
    except OSError as error:
        cpus = spelled(chosen.cpus)
        log.warning("threads are not kept on processors %s: %s", cpus, error.strerror)


# A mask that `settle` has set -> the processors that were ours before: the plan of a second model
# in this process chooses among all of them.
_BEFORE: dict[frozenset[int], frozenset[int]] = {}


def _allowed() -> frozenset[int]:
    mask = topology.affinity()
    return _BEFORE.get(mask, mask)


def _places(cores: list[Core], double: bool) -> int:
    return sum(len(core.cpus) for core in cores) if double else len(cores)


def _near(ours: list[Core], asked: str | None) -> tuple[list[Core], str]:
    """Cores whose memory is near to each other, and why these."""
    nodes = sorted({core.node for core in ours})
    if asked is not None and asked != ALL:
        if not asked.isdecimal() or int(asked) not in nodes:
            raise RequestError(
                f"there is no NUMA node {asked!r} here that this process may use",
                hint=f"give one of {', '.join(map(str, nodes))}, or all",
            )
        return [c for c in ours if c.node == int(asked)], f"{asked}: as asked"
    if len(nodes) == 1:
        return ours, f"{nodes[0]}: the only one"
    if asked == ALL:
        return ours, f"all {len(nodes)}: as asked"
    packages = sorted({core.package for core in ours})
    if len(packages) == 1:
        near = spelled(nodes)
        return ours, f"{near}: they are one socket, and cores count more than their distance"
    # Memory of another socket is half as fast to reach: one socket, the one with most cores.
    best = max(packages, key=lambda p: (sum(c.capacity for c in ours if c.package == p), -p))
    taken = [c for c in ours if c.package == best]
    own = spelled({c.node for c in taken})
    return taken, f"{own} of {spelled(nodes)}: memory of another socket is slow to reach"


def _worth(near: list[Core], asked: str | None) -> tuple[list[Core], str]:
    """The cores that make a run fastest, and why.

    Engines divide a layer into equal shares, so k cores are as fast as k times the slowest of them.
    """
    if asked is not None and asked not in KINDS:
        raise UnknownName("kind of cores", asked, KINDS)
    ranks = sorted({core.capacity for core in near}, reverse=True)
    if len(ranks) == 1 or asked == ALL:
        reason = "as asked" if asked is not None else "all of one kind"
        return near, f"all {len(near)}: {reason}"
    best, *wider = ([c for c in near if c.capacity >= rank] for rank in ranks)
    if asked is not None:
        return best, f"{len(best)} of {len(near)}: as asked"
    for more in wider:
        if _speed(more) >= GAIN * _speed(best):
            best = more
    return best, f"{len(best)} of {len(near)}: in equal shares the slowest core sets the pace"


def _speed(cores: list[Core]) -> int:
    return len(cores) * min(core.capacity for core in cores)


def _threads(root: Path, chosen: list[Core], double: bool, asked: int | None) -> tuple[int, str]:
    """How many, and what set the number."""
    if asked is not None:
        if asked < 1:
            raise RequestError(
                f"--threads {asked}: a run needs 1 thread or more",
                hint="leave it out for one a physical core, within the container's quota",
            )
        return asked, "as asked"
    places = _places(chosen, double)
    what = "processors, hyper-threads too" if double else "physical cores"
    limits: list[tuple[float, str]] = [(places, f"{places} {what}")]
    if (granted := quota(root)) is not None:
        # Not rounded down: two threads that share 1.5 processors get 1.5, one gets 1.
        limits.append((math.ceil(granted), f"the control group grants {granted:g} processors"))
    if (wished := _wished()) is not None:
        limits.append((wished, f"OMP_NUM_THREADS is {wished}"))
    number, reason = min(limits, key=lambda limit: limit[0])
    return max(1, int(number)), reason


def _wished() -> int | None:
    """The user's own limit, of the outermost level: `4` or `4,2,1`. Not a number: none."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _pin(
    root: Path, allowed: frozenset[int], threads: int, places: int, asked: bool | None
) -> tuple[bool, str]:
    """Pinned threads of two processes meet on one core while another is idle: they pay where the
    cores were set aside for this process alone."""
    if asked is not None:
        return asked, "as asked"
    if not allowed < topology.online(root):
        return False, "no processors are set aside for this process, others may run on any"
    if threads < places:
        return False, "there are more cores than threads"
    return True, f"processors {spelled(allowed)} are set aside for this process"


# Extensions, best first: flag of /proc/cpuinfo -> what it speeds up.
EXTENSIONS = {
    "amx_int8": "int8 (AMX)",
    "amx_bf16": "bfloat16 (AMX)",
    "amx_fp16": "float16 (AMX)",
    "avx512_vnni": "int8 (AVX512-VNNI)",
    "avx_vnni": "int8 (AVX-VNNI)",
    "avx512_bf16": "bfloat16 (AVX512-BF16)",
    "avx512_fp16": "float16 (AVX512-FP16)",
    "avx512f": "float32 (AVX-512)",
    "avx2": "float32 (AVX2)",
    "sve": "float32 (SVE)",
    "i8mm": "int8 (I8MM)",
    "bf16": "bfloat16 (BF16)",
    "asimddp": "int8 (dot product)",
    "asimdhp": "float16 (NEON)",
    "asimd": "float32 (NEON)",
}


def extensions(root: Path = ROOT) -> list[str]:
    """What this processor has instructions for, best first, in words."""
    flags = set(_flags(root)[1])
    return [text for flag, text in EXTENSIONS.items() if flag in flags]


@cache
def processor(root: Path = ROOT) -> str:
    """Model name and instruction sets in one line: compiled code may use all of them."""
    model, flags = _flags(root)
    vector = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
    return " ".join([model, *sorted(f for f in flags if f.startswith(vector))])


def _flags(root: Path) -> tuple[str, list[str]]:
    fields: dict[str, str] = {}
    for line in read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
        if not line.strip():
            break
    model = fields.get("model name", platform.processor() or platform.machine())
    return model, fields.get("flags", fields.get("Features", "")).split()
