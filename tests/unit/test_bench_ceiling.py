"""The machine's rate: that a product is computed, in the precision that is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sdengine.bench import ceiling, env, meter
from sdengine.engine.errors import BackendUnavailable, UnknownName


@pytest.mark.ov
@pytest.mark.parametrize(("precision", "near"), [("f32", 1e-4), ("int8", 0.3)])
def test_the_graph_multiplies(precision, near):
    """numpy's product of the same factors; int8 rounds each to a hundredth."""
    request, ran_in, _ = ceiling.product(precision, threads=1, side=64)
    request.infer()
    factors = [np.random.default_rng(seed).uniform(-1, 1, (64, 64)) for seed in (1, 0)]
    expected = factors[0] @ factors[1].T
    assert np.abs(request.output_tensors[0].data - expected).max() < near
    assert ran_in in {"f32": ("f32",), "int8": ("i8", "f32")}[precision]


@pytest.mark.ov
def test_a_rate_is_operations_over_seconds(monkeypatch):
    """2 n^3 operations; the clock is ours: calls of 4, 2 and 3 s, the best counts."""
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(ceiling, "perf_counter", lambda: next(ticks))
    found = ceiling.measure("f32", 1, side=32, calls=3)
    assert found.flops == 2 * 32**3 / 2.0
    assert (found.ran_in, found.threads, found.side) == ("f32", 1, 32)


@pytest.mark.ov
def test_a_precision_that_is_not_computed_here_is_refused(monkeypatch):
    monkeypatch.setattr(ceiling, "product", lambda *_: (None, "f32", "2026"))
    with pytest.raises(BackendUnavailable, match="asked for in bf16 ran in f32") as caught:
        ceiling.measure("bf16", 1)
    assert "sdengine doctor" in caught.value.hint
    with pytest.raises(UnknownName, match="'bf61'"):
        ceiling.measure("bf61", 1)


def test_without_openvino_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailable, match="package openvino") as caught:
        ceiling.measure("f32", 1)
    assert "pip install 'openvino" in caught.value.hint


# --- conditions --------------------------------------------------------------------------------


def test_conditions_are_read_from_the_system(tmp_path, monkeypatch):
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    for name, text in {
        governor: "powersave\n",
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Debian 12"\n',
        "proc/loadavg": "1.25 0.5 0.1 1/100 200\n",
        "proc/meminfo": "MemTotal: 1000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    found = env.conditions(tmp_path)
    assert (found["processor"]["governor"], found["processor"]["quota"]) == ("powersave", 1.5)
    assert (found["system"]["distribution"], found["load"]) == ("Debian 12", 1.25)
    assert found["memory"]["total"] == 1000 * 1024
    assert found["settings"]["KMP_BLOCKTIME"] == "1"


def test_what_a_system_does_not_tell_is_none(tmp_path):
    found = env.conditions(tmp_path)
    assert found["processor"]["governor"] is found["load"] is None
    assert found["system"]["distribution"] is None


def git(folder, *arguments):
    import subprocess

    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    assert env.commit(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    found = env.commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("")
    assert env.commit(tmp_path)["dirty"] is True
    assert env.commit(tmp_path / "new") == {"commit": None, "dirty": None}, "another's repository"
    monkeypatch.setenv("PATH", "")
    assert env.commit(tmp_path) == {"commit": None, "dirty": None}


def test_only_conditions_that_matter_differ():
    a = {"time": "1", "load": 1.0, "processor": {"threads": 2}, "packages": {"torch": "1"}}
    b = {"time": "2", "load": 2.0, "processor": {"threads": 2}, "packages": {"numpy": "1"}}
    assert env.differences(a, b) == ["packages.numpy: None, then 1", "packages.torch: 1, then None"]


# --- the meter ---------------------------------------------------------------------------------


class Session:
    spec = "the spec"

    def __call__(self, feeds):
        return {"y": feeds["x"]}

    def bind(self, feeds):
        return self


class Sessions:
    closed = False

    def __call__(self, component, dims, *, paired=False):
        return Session()

    def close(self):
        self.closed = True


def test_the_meter_notes_every_call_and_changes_nothing(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(meter, "perf_counter", lambda: float(next(ticks)))
    inner = Sessions()
    watch = meter.Watch(inner)
    session = watch("unet", {"h": 2, "B": 1})
    bound = session.bind({"x": 1})
    assert [bound({"x": n})["y"] for n in (1, 2)] == [1, 2]
    assert session.spec == "the spec"
    facts = {"component": "unet", "dims": {"B": 1, "h": 2}}
    assert watch.calls() == [
        {**facts, "what": "open", "seconds": [1.0]},
        {**facts, "what": "bind", "seconds": [1.0]},
        {**facts, "what": "run", "seconds": [1.0, 1.0]},
    ]
    watch.clear()
    assert watch.calls() == []
    watch.close()
    assert inner.closed
