"""What this machine gives us: processor threads, and the name of the processor.

Containers hide their limits: the kernel reports the host's processors, the control group allows
fewer. Engines that count for themselves then start too many threads and get slower.
"""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path


def threads(root: Path = Path("/")) -> int:
    """Threads that pay off here: physical cores that we may use, within the control group's quota
    and $OMP_NUM_THREADS."""
    limits = [_physical(root, _affinity()), _wished()]
    if (quota := _quota(root)) is not None:
        limits.append(math.ceil(quota))
    return max(1, int(min(limits)))


def _wished() -> float:
    """The user's own limit, of the outermost level: `4` or `4,2,1`. Not a number: none."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else math.inf


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # not on macOS and Windows


def _physical(root: Path, allowed: frozenset[int]) -> int:
    """Two threads of one core share its vector units: count cores, where the kernel tells."""
    topology = root / "sys/devices/system/cpu"
    cores = {_read(topology / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    return len(cores)


def _quota(root: Path) -> float | None:
    """The tightest processor quota of our control group and its parents; None: no limit.

    source  Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst
    """
    found = [q for folder in _groups(root, "cpu") if (q := _group_quota(folder)) is not None]
    return min(found, default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a run may still take: what the kernel can free, within what every control group
    above us has left. None where the kernel does not say.

    source  Linux, Documentation/filesystems/proc.rst (MemAvailable), admin-guide/cgroup-v2.rst
            (memory.max; memory.current counts cached files, which make room when asked)
    """
    lines = _read(root / "proc/meminfo").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "MemAvailable" not in fields:
        return None
    left = [int(fields["MemAvailable"].split()[0]) * 1024]
    for folder in _groups(root, "memory"):
        if (room := _group_memory(folder)) is not None:
            left.append(room)
    return max(0, min(left))


def _group_memory(folder: Path) -> int | None:
    """Bytes that a control group has left; None: no limit."""
    limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
    files = "inactive_file"
    if not limit:
        limit, used = (_read(folder / f"memory.{n}_in_bytes") for n in ("limit", "usage"))
        files = "total_inactive_file"
    if not limit.isdecimal() or not used.isdecimal():  # "max" is no limit
        return None
    stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(limit) - int(used) + int(stat.get(files, 0))


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of our control groups, each with its parents; v2 and v1."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup"
        bases = (
            [mount, mount / "unified"]
            if not controllers
            else [mount / controller, mount / controllers]
        )
        steps = [p for p in path.split("/") if p]
        for base in bases:
            folders += [base.joinpath(*steps[:n]) for n in range(len(steps) + 1)]
    return folders


def _group_quota(folder: Path) -> float | None:
    v2 = _read(folder / "cpu.max").split()
    if len(v2) == 2:
        return None if v2[0] == "max" else int(v2[0]) / int(v2[1])
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


@cache
def processor() -> str:
    """Model name and instruction sets in one line: compiled code may use all of them."""
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
        if not line.strip():
            break
    model = fields.get("model name", platform.processor() or platform.machine())
    vector = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
    flags = fields.get("flags", fields.get("Features", "")).split()
    return " ".join([model, *sorted(f for f in flags if f.startswith(vector))])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
