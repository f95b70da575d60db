"""The conditions that belong beside every figure: what it was measured on, and with what."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends import doctor, limits, machine

ROOT = Path(__file__).parents[1]

# Settings of engines and allocators that change a speed and that no figure shows.
SETTINGS = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_", "LD_PRELOAD", "TBB_")


def conditions(root: Path = Path("/")) -> dict[str, Any]:
    """Plain JSON types; None for what this system does not tell.

    root    where /proc and /sys are looked for
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": {
            "name": machine.processor(),
            "visible": os.cpu_count(),
            "quota": limits.quota(root),
            "threads": machine.threads(),
            "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        },
        "memory": doctor.memory(root),
        "system": {
            "name": platform.system(),
            "kernel": platform.release(),
            "distribution": distribution(root),
            "machine": platform.machine(),
        },
        "load": _load(root),
        "python": platform.python_version(),
        "packages": {n: v for n in doctor.PACKAGES if (v := doctor.installed(n)) is not None},
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
        "sdengine": {"version": __version__, **commit()},
    }


def distribution(root: Path = Path("/")) -> str | None:
    """`Debian GNU/Linux 12 (bookworm)`"""
    text = _text(root / "etc/os-release")
    lines = [] if text is None else text.splitlines()
    names = [line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")]
    return names[0] if names else None


def commit(root: Path = ROOT) -> dict[str, Any]:
    """{"commit": hash, "dirty": whether files differ from it}; both None outside of a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    changed = _git(root, "status", "--porcelain")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": changed != ""}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Conditions of two runs that differ, as `processor.threads: 2, then 4`; times and load apart,
    which always do."""
    left, right = _flat(a), _flat(b)
    names = [n for n in sorted(left | right) if not n.startswith(("time", "load", "memory.avail"))]
    return [
        f"{name}: {left.get(name)}, then {right.get(name)}"
        for name in names
        if left.get(name) != right.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    dot = "." if name else ""
    return {k: v for key in value for k, v in _flat(value[key], f"{name}{dot}{key}").items()}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _load(root: Path) -> float | None:
    """Processes that wanted to run, mean of the last minute: other work shows here."""
    text = _text(root / "proc/loadavg")
    return None if text is None else float(text.split()[0])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
