"""Names, choosing, and what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdengine import backends
from sdengine.engine.errors import BackendUnavailable, UnknownName
from sdengine.engine.ports import Probe


class Stub:
    def __init__(self, name, probe):
        self.name, self._probe, self.probed = name, probe, 0

    def probe(self):
        self.probed += 1
        return self._probe


@pytest.fixture
def stubs(monkeypatch):
    """The registered names; `stubs["openvino"] = Probe(...)` says what one answers."""
    made: dict[str, Stub] = {}

    class Setter:
        def __setitem__(self, name, probe):
            made[name] = Stub(name, probe)

        def __getitem__(self, name):
            return made[name]

    setter = Setter()
    for name in backends.NAMES:
        setter[name] = Probe(True, f"{name} 1.0", precisions=("f32",))
    monkeypatch.setattr(backends, "get", lambda name: made[name])
    return setter


def test_every_name_gives_its_backend():
    assert backends.NAMES == ("openvino", "onnxruntime", "ipex", "torch")
    for name in (*backends.ALL, "fake"):
        assert backends.get(name).name == name


def test_the_order_is_that_of_speed():
    speeds = [p.speed for p in (backends.get(n).probe() for n in backends.NAMES) if p.ok]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("name", "near"), [("openvno", "openvino"), ("ort", "torch"), ("OnnxRuntime", "onnxruntime")]
)
def test_an_unknown_name(name, near):
    for call in (backends.get, backends.choose):
        with pytest.raises(UnknownName, match=f"unknown backend '{name}'") as caught:
            call(name)
        assert near in caught.value.hint
        assert "fake" not in caught.value.hint


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_takes_the_fastest_and_asks_no_slower_one(name, stubs):
    choice = backends.choose(name)
    assert choice.backend.name == "openvino"
    assert choice.probe.precisions == ("f32",)
    assert choice.reason == "the fastest that can run: openvino 1.0"
    assert stubs["torch"].probed == 0


def test_auto_passes_over_what_cannot_run_and_says_so(stubs):
    stubs["openvino"] = Probe(False, "openvino is not installed", "pip install openvino")
    choice = backends.choose()
    assert choice.backend.name == "onnxruntime"
    assert choice.reason == (
        "the fastest that can run: onnxruntime 1.0; not openvino: openvino is not installed"
    )


def test_a_named_one(stubs):
    choice = backends.choose("torch")
    assert choice.backend.name == "torch"
    assert choice.reason == "asked for: torch 1.0"


def test_a_named_one_that_cannot_run(stubs):
    stubs["torch"] = Probe(False, "the package torch is not installed", "pip install torch")
    with pytest.raises(BackendUnavailable) as caught:
        backends.choose("torch")
    assert caught.value.message == (
        "backend torch cannot run here: the package torch is not installed"
    )
    assert caught.value.hint == "pip install torch"


def test_a_named_one_that_nothing_mends(stubs):
    stubs["openvino"] = Probe(False, "no processor")
    with pytest.raises(BackendUnavailable) as caught:
        backends.choose("openvino")
    assert "sdengine doctor" in caught.value.hint


def test_nothing_can_run(stubs):
    for name in backends.NAMES:
        stubs[name] = Probe(False, f"{name} is broken", f"pip install {name}")
    with pytest.raises(BackendUnavailable, match="openvino: openvino is broken; onnxr") as caught:
        backends.choose()
    assert caught.value.hint == "pip install openvino"


def test_nothing_heavy_is_imported():
    program = (
        "import sys; from sdengine import backends; [backends.get(n) for n in backends.ALL];"
        "heavy = {'openvino', 'onnxruntime', 'torch', 'onnx', 'safetensors', 'tensorrt', 'cuda'};"
        "print(heavy & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
