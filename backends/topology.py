"""The processors that we may use: which are one core, which share memory, which are the fast ones.

root    of the tree that /proc and /sys are read from: tests hand in other machines
checked by  tests/unit/test_machine_plan.py
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .limits import read

FULL = 1024  # the capacity of a machine's fastest core, as the kernel counts
# An efficient core of a hybrid x86 processor against a fast one, in vector work: half the width of
# arithmetic, at about four fifths of the clock. The kernel's own number is about scalar work.
ATOM = 410


@dataclass(frozen=True)
class Core:
    """A physical core: one vector unit, shared by its processors (hyper-threads).

    cpus        numbers of its processors, those alone that we may use
    node        its NUMA node
    package     its socket
    capacity    its speed, 1024 for the fastest of the machine
    """

    cpus: tuple[int, ...]
    node: int
    package: int
    capacity: int

    @property
    def cpu(self) -> int:
        """The processor that one thread on this core uses."""
        return self.cpus[0]


def cores(root: Path, allowed: Iterable[int]) -> list[Core]:
    """The cores behind the allowed processors, in order of their numbers.

    What the kernel does not tell is taken as the plainest case: one processor a core, one node, one
    socket, all equally fast.
    source  Linux, Documentation/ABI/stable/sysfs-devices-system-cpu (topology), -node (cpulist),
            ABI/testing/sysfs-devices-system-cpu (cpu_capacity); cpu_core, cpu_atom: perf's
            folders of the two kinds of cores of a hybrid x86 processor
    """
    nodes = {cpu: number for number, cpus in node_lists(root).items() for cpu in cpus}
    slow = numbers(read(root / "sys/devices/cpu_atom/cpus"))
    groups: dict[str, list[int]] = {}
    for cpu in sorted(allowed):
        siblings = read(_place(root, cpu) / "topology/thread_siblings_list")
        groups.setdefault(siblings if siblings else str(cpu), []).append(cpu)
    return [
        Core(
            tuple(cpus),
            nodes.get(cpus[0], 0),
            _number(_place(root, cpus[0]) / "topology/physical_package_id", 0),
            ATOM if cpus[0] in slow else _number(_place(root, cpus[0]) / "cpu_capacity", FULL),
        )
        for cpus in groups.values()
    ]


def node_lists(root: Path) -> dict[int, frozenset[int]]:
    """NUMA node -> its processors; nodes that are memory alone are left out."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    found = {int(f.name.removeprefix("node")): numbers(read(f / "cpulist")) for f in folders}
    return {node: found[node] for node in sorted(found) if found[node]}


def affinity() -> frozenset[int]:
    """Processors that this process may run on: its mask, which a cpuset narrows too."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # not on macOS and Windows


def online(root: Path) -> frozenset[int]:
    """All processors of the machine, ours or not; empty where the kernel does not say."""
    return numbers(read(root / "sys/devices/system/cpu/online"))


def numbers(text: str) -> frozenset[int]:
    """`0-3,8,10-11` -> the numbers."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last if last.isdecimal() else first) + 1))
    return frozenset(found)


def spelled(cpus: Iterable[int]) -> str:
    """The reverse of `numbers`: `0-3,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _place(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _number(path: Path, otherwise: int) -> int:
    text = read(path)
    return int(text) if text.isdecimal() else otherwise
