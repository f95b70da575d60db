"""What our control group and the kernel leave us: processor time and memory.

Containers hide their limits: the kernel reports the host's processors and memory, the control
group allows less. Engines that count for themselves then start too many threads and get slower.

root    of the tree that /proc and /sys are read from: tests hand in other machines
checked by  tests/unit/test_backend_machine.py, tests/unit/test_machine_plan.py
"""

from __future__ import annotations

from pathlib import Path


def quota(root: Path) -> float | None:
    """Processors that our control group and its parents grant at most; None: no limit.

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
    known = meminfo(root)
    if "MemAvailable" not in known:
        return None
    left = [known["MemAvailable"]]
    for folder in _groups(root, "memory"):
        if (room := _group_memory(folder)) is not None:
            left.append(room)
    return max(0, min(left))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that our control group and its parents grant at most; None: no limit."""
    granted = [n for folder in _groups(root, "memory") if (n := _limit(folder)) is not None]
    total = meminfo(root).get("MemTotal")
    least = min(granted, default=None)
    # cgroup v1 writes "no limit" as a number beyond any memory
    return None if least is None or (total is not None and least >= total) else least


def meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    lines = read(root / "proc/meminfo").splitlines()
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in fields}


def read(path: Path) -> str:
    """The text of a file, stripped; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (text := read(folder / name)).isdecimal():  # "max" is no limit
            return int(text)
    return None


def _group_memory(folder: Path) -> int | None:
    """Bytes that a control group has left; None: no limit."""
    limit = _limit(folder)
    v2 = read(folder / "memory.current")
    used = v2 if v2 else read(folder / "memory.usage_in_bytes")
    if limit is None or not used.isdecimal():
        return None
    before = "" if v2 else "total_"
    stat = dict(line.split() for line in read(folder / "memory.stat").splitlines())
    files = sum(int(stat.get(f"{before}{kind}_file", 0)) for kind in ("active", "inactive"))
    return limit - int(used) + files


def _group_quota(folder: Path) -> float | None:
    v2 = read(folder / "cpu.max").split()
    if len(v2) == 2:
        return None if v2[0] == "max" else int(v2[0]) / int(v2[1])
    granted, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
    if not granted or not period or int(granted) <= 0:
        return None
    return int(granted) / int(period)


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of our control groups, each with its parents; v2 and v1."""
    folders = []
    for line in read(root / "proc/self/cgroup").splitlines():
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
