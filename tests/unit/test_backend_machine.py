"""Threads and processor: on trees that imitate /proc and /sys as the kernel documents them."""

from __future__ import annotations

import os

import pytest

from sdengine.backends import machine


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A machine with 16 processors on 8 cores, and no quota."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for n in range(16):
        write(
            tmp_path,
            f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list",
            f"{n % 8},{n % 8 + 8}\n",
        )
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cores_not_processors(tree):
    assert machine.threads(tree) == 8


def test_affinity(tree, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 8})  # 0 and 8 are one core
    assert machine.threads(tree) == 2


def test_without_topology(tree, monkeypatch, tmp_path_factory):
    assert machine.threads(tmp_path_factory.mktemp("empty")) == 16


@pytest.mark.parametrize(
    ("text", "threads"),
    [("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1), ("max 100000", 8)],
)
def test_quota_of_cgroup_2(tree, text, threads):
    write(tree, "proc/self/cgroup", "0::/\n")
    write(tree, "sys/fs/cgroup/cpu.max", text + "\n")
    assert machine.threads(tree) == threads


def test_a_parents_quota_counts(tree):
    write(tree, "proc/self/cgroup", "0::/a.slice/b.scope\n")
    write(tree, "sys/fs/cgroup/a.slice/cpu.max", "300000 100000\n")
    write(tree, "sys/fs/cgroup/a.slice/b.scope/cpu.max", "max 100000\n")
    assert machine.threads(tree) == 3


@pytest.mark.parametrize(("quota", "threads"), [("400000", 4), ("-1", 8)])
def test_quota_of_cgroup_1(tree, quota, threads):
    write(tree, "proc/self/cgroup", "3:cpuset:/\n2:cpu,cpuacct:/box\n0::/\n")
    write(tree, "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", quota + "\n")
    write(tree, "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    assert machine.threads(tree) == threads


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), ("2,4", 2), ("64", 8), ("", 8), ("many", 8), ("0", 8)]
)
def test_the_users_own_limit(tree, text, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert machine.threads(tree) == threads


def test_here():
    assert 1 <= machine.threads() <= (os.cpu_count() or 1)
    assert machine.processor().strip() == machine.processor() != ""


MIB = 1 << 20


def test_memory_is_what_the_kernel_can_free(tree):
    write(tree, "proc/meminfo", "MemTotal:  8000 kB\nMemFree: 100 kB\nMemAvailable:   6000 kB\n")
    assert machine.available_memory(tree) == 6000 * 1024


def test_memory_of_a_system_that_does_not_say(tmp_path):
    assert machine.available_memory(tmp_path) is None


def test_memory_within_a_control_group_and_its_parents(tree):
    write(tree, "proc/meminfo", f"MemAvailable: {8000 * 1024} kB\n")
    write(tree, "proc/self/cgroup", "0::/a.slice/b.scope\n")
    write(tree, "sys/fs/cgroup/a.slice/memory.max", f"{1000 * MIB}\n")
    write(tree, "sys/fs/cgroup/a.slice/memory.current", f"{700 * MIB}\n")
    write(
        tree,
        "sys/fs/cgroup/a.slice/memory.stat",
        f"anon 5\nactive_file {50 * MIB}\ninactive_file {150 * MIB}\n",
    )
    write(tree, "sys/fs/cgroup/a.slice/b.scope/memory.max", "max\n")
    write(tree, "sys/fs/cgroup/a.slice/b.scope/memory.current", f"{700 * MIB}\n")
    assert machine.available_memory(tree) == 500 * MIB


def test_memory_of_cgroup_1(tree):
    write(tree, "proc/meminfo", f"MemAvailable: {8000 * 1024} kB\n")
    write(tree, "proc/self/cgroup", "4:memory:/box\n")
    write(tree, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{900 * MIB}\n")
    write(tree, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", f"{300 * MIB}\n")
    write(tree, "sys/fs/cgroup/memory/box/memory.stat", f"total_inactive_file {50 * MIB}\n")
    assert machine.available_memory(tree) == 650 * MIB
