"""The plan of a run on other machines: trees that imitate /proc and /sys as the kernel documents.

What is expected of each stands beside it: counts that anybody can make by hand.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdengine.backends import doctor, machine, topology
from sdengine.backends.machine import Wish, plan
from sdengine.engine.errors import RequestError, UnknownName


class Tree:
    """A machine: `cores` is one tuple (package, node, capacity or None, processors) a core."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._patch = root, monkeypatch
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def cores(self, cores: list[tuple[int, int, int | None, tuple[int, ...]]]) -> None:
        nodes: dict[int, list[int]] = {}
        for package, node, capacity, cpus in cores:
            nodes.setdefault(node, []).extend(cpus)
            for cpu in cpus:
                place = f"sys/devices/system/cpu/cpu{cpu}"
                self.write(f"{place}/topology/thread_siblings_list", topology.spelled(cpus))
                self.write(f"{place}/topology/physical_package_id", str(package))
                if capacity is not None:
                    self.write(f"{place}/cpu_capacity", str(capacity))
        for node, cpus in nodes.items():
            self.write(f"sys/devices/system/node/node{node}/cpulist", topology.spelled(cpus))
        every = {cpu for *_, cpus in cores for cpu in cpus}
        self.write("sys/devices/system/cpu/online", topology.spelled(every))
        self.allow(every)

    def allow(self, cpus: set[int]) -> None:
        self._patch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_BEFORE", {})
    return Tree(tmp_path, monkeypatch)


@pytest.fixture
def laptop(tree):
    """6 fast cores with two processors each (0-11), 8 slow ones (12-19), as a hybrid x86."""
    fast = [(0, 0, None, (2 * n, 2 * n + 1)) for n in range(6)]
    tree.cores(fast + [(0, 0, None, (n,)) for n in range(12, 20)])
    tree.write("sys/devices/cpu_core/cpus", "0-11")
    tree.write("sys/devices/cpu_atom/cpus", "12-19")
    return tree


@pytest.fixture
def server(tree):
    """Two sockets of 16 cores, each core with two processors; a node a socket."""
    tree.cores([(n // 16, n // 16, None, (n, n + 32)) for n in range(32)])
    return tree


def test_a_hybrid_laptop_runs_on_its_fast_cores(laptop):
    found = plan(laptop.root)
    assert (found.threads, found.fast_only, found.confined) == (6, True, True)
    assert found.cpus == tuple(range(12))
    assert found.why["cores"].startswith("6 of 14: ")
    assert found.hyper_threads is False


def test_all_cores_of_a_hybrid_laptop_on_request(laptop):
    found = plan(laptop.root, Wish(cores="all"))
    assert (found.threads, found.fast_only, found.confined) == (14, False, False)


def test_few_fast_cores_among_many_slow_ones_are_not_worth_the_rest(tree):
    """2 fast and 8 slow: 10 at 0.4 of the speed are twice as fast as 2."""
    tree.cores([(0, 0, None, (n,)) for n in range(10)])
    tree.write("sys/devices/cpu_atom/cpus", "2-9")
    assert plan(tree.root).threads == 10
    assert plan(tree.root, Wish(cores="fast")).threads == 2


@pytest.mark.parametrize(
    ("little", "threads"),
    [(530, 4), (600, 8)],
    ids=["8 x 0.52 = 4.1: too little gain", "8 x 0.59 = 4.7: all"],
)
def test_an_arm_board_with_two_kinds_of_cores(tree, little, threads):
    """The little ones first, as on many boards; the kernel tells how fast they are."""
    kinds = [little] * 4 + [1024] * 4
    tree.cores([(0, 0, capacity, (n,)) for n, capacity in enumerate(kinds)])
    found = plan(tree.root)
    assert found.threads == threads
    assert found.cpus == tuple(range(8 - threads, 8))


def test_a_server_with_two_sockets_runs_on_one(server):
    found = plan(server.root)
    assert (found.threads, found.confined) == (16, True)
    assert found.cpus == (*range(16), *range(32, 48))
    assert found.why["node"] == "0 of 0-1: memory of another socket is slow to reach"


@pytest.mark.parametrize(
    ("node", "threads", "first"), [("1", 16, 16), ("0", 16, 0), ("all", 32, 0)]
)
def test_a_node_by_request(server, node, threads, first):
    found = plan(server.root, Wish(node=node))
    assert (found.threads, found.cpus[0]) == (threads, first)


def test_the_socket_with_more_cores_that_are_ours(server):
    server.allow({0, 1, 16, 17, 18, 48})
    found = plan(server.root)
    assert (found.threads, found.cpus) == (3, (16, 17, 18, 48))


def test_nodes_of_one_socket_stay_together(tree):
    """A socket that shows itself as four nodes: a quarter of its cores would be slower."""
    tree.cores([(0, n // 4, None, (n,)) for n in range(16)])
    found = plan(tree.root)
    assert (found.threads, found.confined) == (16, False)
    assert found.why["node"].startswith("0-3: ")
    assert plan(tree.root, Wish(node="2")).cpus == (8, 9, 10, 11)


def test_a_container_with_one_and_a_half_processors(server):
    """Two threads on 1.5 processors get all of it."""
    server.write("proc/self/cgroup", "0::/box")
    server.write("sys/fs/cgroup/box/cpu.max", "150000 100000")
    found = plan(server.root)
    assert found.threads == 2
    assert found.why["threads"] == "the control group grants 1.5 processors"
    assert found.pin is False, "another container may be on any of these cores"


def test_more_threads_than_a_socket_has(server):
    found = plan(server.root, Wish(threads=24))
    assert (found.threads, found.confined, found.hyper_threads) == (24, False, False)
    assert plan(server.root, Wish(threads=40)).hyper_threads is True
    held = plan(server.root, Wish(threads=24, node="0"))
    assert (held.confined, held.hyper_threads) == (True, True), "a node that was asked for stays"


def test_hyper_threads_by_request(server):
    assert plan(server.root, Wish(hyper_threads=True)).threads == 32


def test_pinned_where_processors_are_set_aside(server):
    assert plan(server.root).pin is False
    server.allow({4, 5, 6, 7})
    found = plan(server.root)
    assert (found.pin, found.threads) == (True, 4)
    assert found.why["pin"] == "processors 4-7 are set aside for this process"
    assert plan(server.root, Wish(pin=False)).pin is False
    assert plan(server.root, Wish(threads=2)).pin is False
    assert plan(server.root, Wish(threads=2, pin=True)).pin is True


def test_places_for_pinned_threads(server):
    """Different cores before the second processors of the same ones."""
    server.allow({0, 1, 32, 33})
    assert machine.places(2, server.root) == [0, 1]
    assert machine.places(3, server.root) == [0, 1, 32]
    assert machine.places(5, server.root) == []


def test_a_machine_that_says_nothing(tree):
    tree.allow(set(range(4)))
    found = plan(tree.root)
    assert (found.threads, found.confined, found.pin, found.fast_only) == (4, False, False, None)


@pytest.mark.parametrize(
    ("wish", "error", "message", "hint"),
    [
        (Wish(threads=0), RequestError, "--threads 0", "leave it out"),
        (Wish(node="7"), RequestError, "no NUMA node '7'", "give one of 0, 1, or all"),
        (Wish(node="x"), RequestError, "no NUMA node 'x'", "give one of 0, 1, or all"),
        (Wish(cores="slow"), UnknownName, "kind of cores 'slow'", "known: all, fast"),
    ],
)
def test_what_is_not_there(server, wish, error, message, hint):
    with pytest.raises(error, match=message) as caught:
        plan(server.root, wish)
    assert hint in caught.value.hint


def test_the_thread_and_its_children_stay_on_the_chosen_cores(server, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: asked.append((pid, set(cpus))))
    machine.settle(plan(server.root, Wish(node="all")))
    assert asked == [], "nothing is left out: nothing is changed"
    machine.settle(plan(server.root))
    assert asked == [(0, {*range(16), *range(32, 48)})]


def test_a_second_model_chooses_among_all_cores_again(server, monkeypatch):
    """The first one's choice must not look like what the process was given."""
    mask = set(os.sched_getaffinity(0))
    whole = frozenset(mask)

    def narrow(pid, cpus):
        mask.clear()
        mask.update(cpus)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(mask))
    monkeypatch.setattr(os, "sched_setaffinity", narrow)
    first = plan(server.root)
    machine.settle(first)
    assert mask == {*range(16), *range(32, 48)}
    assert plan(server.root) == first, "the same again, not confined to itself"
    second = plan(server.root, Wish(node="1"))
    machine.settle(second)
    assert not mask & set(first.cpus), "the other socket"
    everything = plan(server.root, Wish(node="all"))
    machine.settle(everything)
    assert mask == whole
    assert not everything.confined


def test_a_refused_affinity_is_said_and_no_error(server, monkeypatch, caplog):
    def refuse(pid, cpus):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    machine.settle(plan(server.root))
    assert caplog.messages == ["threads are not kept on processors 0-15,32-47: Invalid argument"]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (
            "flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16",
            ["int8 (AMX)", "bfloat16 (AMX)", "int8 (AVX512-VNNI)", "bfloat16 (AVX512-BF16)",
             "float32 (AVX-512)", "float32 (AVX2)"],
        ),
        (
            "Features\t: fp asimd asimdhp asimddp",
            ["int8 (dot product)", "float16 (NEON)", "float32 (NEON)"],
        ),
        ("flags\t\t: fpu sse2", []),
    ],
)  # fmt: skip
def test_instruction_sets(tree, flags, found):
    tree.write("proc/cpuinfo", f"processor\t: 0\nmodel name\t: Some CPU\n{flags}\n")
    assert machine.extensions(tree.root) == found


@pytest.mark.parametrize("text", ["0-3,8,10-11", "5", ""])
def test_lists_of_processors(text):
    assert topology.spelled(topology.numbers(text)) == text


def test_doctor_shows_the_plan_and_why(server):
    server.write("proc/cpuinfo", "model name\t: Some CPU\nflags\t: avx2 avx512_vnni\n")
    found = doctor.processor(server.root)
    assert found["plan"]["threads"] == 16
    rows = dict(doctor._plan_rows(found))
    assert rows["numa node"] == "0 of 0-1: memory of another socket is slow to reach"
    assert rows["threads"].endswith("16 physical cores")
    assert rows["pinned"].startswith("no: ")
