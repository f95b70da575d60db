"""What `sdengine doctor` finds out, on made-up machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sdengine.backends.doctor import Conflict, cache, conflicts, first_able, lines, memory
from sdengine.engine.ports import Probe

GOOD = {
    "openvino": "2026.4.1",
    "onnxruntime": "1.32.0",
    "torch": "2.14.1",
    "torchvision": "0.29.2",
}


def found(**changes: str | None) -> list[Conflict]:
    packages: Mapping[str, str | None] = {
        **GOOD,
        **{name.replace("_", "-"): version for name, version in changes.items()},
    }
    version: Callable[[str], str | None] = packages.get
    return conflicts(version)


def test_what_is_tested_stands_together() -> None:
    assert found() == []


def test_a_base_install_stands_together() -> None:
    assert found(torch=None, torchvision=None, onnxruntime=None) == []


@pytest.mark.parametrize(
    ("changes", "what", "mend"),
    [
        ({"openvino": None}, "openvino", "pip install openvino"),
        ({"onnxruntime_gpu": "1.31.0"}, "onnxruntime-gpu are both", "pip uninstall -y onnxruntime"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "torchvision 0.28.0", "torchvision=="),
        ({"torch": "2.13.0"}, "torch 2.13.0 and torchvision 0.29.2", "torch=="),
        ({"intel_extension_for_pytorch": "2.8.0"}, "torch 2.14.1", "'sdengine[ipex]'"),
        (
            {"intel_extension_for_pytorch": "2.8.0", "torch": None, "torchvision": None},
            "torch None",
            "'sdengine[ipex]'",
        ),
    ],
)
def test_what_cannot_stand_together(changes: dict[str, str | None], what: str, mend: str) -> None:
    (conflict,) = found(**changes)
    assert what in conflict.what
    assert mend in conflict.mend
    assert len(conflict.why) > 20


def test_ipex_beside_its_own_torch_is_fine() -> None:
    own = {"torch": "2.8.0", "torchvision": "0.23.0", "intel_extension_for_pytorch": "2.8.0"}
    assert found(**own) == []


def test_auto_takes_the_first_that_can_run() -> None:
    good, bad = Probe(True, "here"), Probe(False, "not here")
    assert first_able({"a": bad, "b": good, "c": good}) == "b"
    assert first_able({"a": bad}) is None
    assert first_able({}) is None


def test_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemFree: 5 kB\nMemAvailable: 9 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1048576\n")
    assert memory(tmp_path) == {"total": 2_048_000, "available": 9216, "limit": 1_048_576}
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory(tmp_path)["limit"] is None


def test_a_kernel_that_says_nothing(tmp_path: Path) -> None:
    assert memory(tmp_path) == {"total": None, "available": None, "limit": None}


def test_the_cache_is_measured_before_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "not" / "yet"))
    state = cache()
    assert (state["bytes"], state["writable"]) == (0, True)
    assert state["free"] > 0
    (tmp_path / "not" / "yet" / "deep").mkdir(parents=True)
    (tmp_path / "not" / "yet" / "deep" / "x").write_bytes(bytes(1000))
    assert cache()["bytes"] == 1000


def test_a_cache_below_a_file_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert cache()["writable"] is False


def test_no_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDENGINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    state = cache()
    assert state["path"] is None
    assert "home" in state["why"]


def test_a_machine_that_can_run_nothing_is_shown_in_full() -> None:
    machine = {
        "python": {"version": "3.12.1", "executable": "/usr/bin/python3"},
        "system": "Linux",
        "processor": {
            "name": "a processor",
            "visible": 8,
            "threads": 2,
            "extensions": ["int8 (AMX)", "float32 (AVX2)"],
            "plan": {
                "threads": 2,
                "pin": False,
                "hyper_threads": False,
                "why": {"threads": "a quota", "cores": "all", "node": "0", "pin": "shared"},
            },
        },
        "memory": {"total": 8_000_000_000, "available": None, "limit": 2_000_000_000},
        "cache": {"path": None, "bytes": 0, "free": None, "writable": False, "why": "no home"},
        "packages": {"numpy": "2.4", "torch": None},
        "conflicts": [{"what": "a and b", "why": "they fight", "mend": "pip uninstall b"}],
        "backends": {
            "openvino": {
                "ok": False,
                "reason": "openvino is not installed",
                "mend": "pip install openvino",
                "precisions": [],
                "speed": 0,
            }
        },
        "auto": None,
    }
    text = "\n".join(lines(machine))
    for part in (
        "3.12.1",
        "2 of 8 visible: a quota",
        "--numa-node",
        "int8 (AMX), float32 (AVX2)",
        "no: shared",
        "8.0 GB total, 2.0 GB limit",
        "none: no home",
        "no   openvino is not installed",
        "pip install openvino",
        "warning: a and b",
        "pip uninstall b",
    ):
        assert part in text, part
