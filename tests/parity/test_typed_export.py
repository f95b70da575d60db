"""A bundle made ready for NVIDIA's engines: what is written, what stays, what is refused.

The builds themselves are a function of our own here; tests/contract/test_trt_rtx.py has real ones.
"""

from __future__ import annotations

import enum
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdengine.backends import plans
from sdengine.backends.onnxruntime import OnnxRuntime
from sdengine.backends.plan_build import Built
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import (
    BackendUnavailable,
    ParityFailure,
    RequestError,
    SdengineError,
    UnknownName,
)
from sdengine.engine.spec import Profile
from sdengine.export import add_nvidia, nvidia
from sdengine.export.builds import run_builds
from sdengine.export.parity import Gate, distance
from sdengine.export.quantize import Choice, write_twin
from sdengine.export.repro import repeat
from sdengine.export.shapes import Ask, Shapes
from sdengine.export.targets.tensorrt import Emulated
from sdengine.export.typed import write_typed

pytestmark = [pytest.mark.export, pytest.mark.ort]

SMS = enum.Enum("SMS", {"SM75": 1, "SM89": 2, "SM120": 3})


@pytest.fixture(scope="module")
def ready(mini_bundle, tmp_path_factory) -> Path:
    """The mini model with typed graphs in float16. Not to be changed: `copy` gives one's own."""
    folder = tmp_path_factory.mktemp("ready") / "mini"
    shutil.copytree(mini_bundle, folder)
    return add_nvidia(folder, ["trt"])


@pytest.fixture
def copy(ready, tmp_path) -> Path:
    shutil.copytree(ready, tmp_path / "mini")
    return tmp_path / "mini"


@pytest.fixture
def library(monkeypatch):
    """A library that builds 3 bytes: its version may be changed; `jobs` are what it built."""
    made = SimpleNamespace(__version__="1.7", ComputeCapability=SMS, jobs=[])

    def build(job):
        made.jobs.append(job)
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        Path(job.out).write_bytes(b"eng" + bytes([len(made.jobs)]))
        return Built(1.0, 4, 10**9, made.__version__)

    monkeypatch.setattr(nvidia, "load", lambda name: made)
    monkeypatch.setattr(nvidia, "run_builds", functools.partial(run_builds, build=build))
    return made


def test_typed_graphs_are_written_and_judged(ready, mini_bundle):
    bundle, before = open_bundle(ready), open_bundle(mini_bundle)
    assert bundle.targets["trt"].precisions == ("f16",)
    for name, component in bundle.components.items():
        typed = plans.typed(component, "f16")
        assert set(typed.graphs) == set(component.graphs)
        assert typed.weights == component.weights  # float16 already
        assert component.key == before.components[name].key
        judged = [r for r in bundle.parity if (r.component, r.runtime) == (name, "trt")]
        assert {r.graph for r in judged} == set(component.graphs) - {"prologue"}
        assert all(r.precision == "f16" and r.psnr_db > 40 for r in judged)
    content = json.loads((ready / "manifest.json").read_text())
    assert content["components"]["unet"]["typed"]["f16"]["recipe"]["half"] == "float16"


def test_engines_are_built_once_and_found(copy, library):
    ask = Ask((89, 120), Shapes(halves=(2, 1)))
    add_nvidia(copy, ["trt-rtx"], ask=ask)
    bundle = open_bundle(copy)
    unet = plans.typed(bundle.components["unet"], "f16")
    steps = [g for g in unet.graphs if g != "prologue"]
    assert len([e for e in unet.engines if e.graph in steps]) == len(steps) * 2 * 2
    dims = {"B": 1, "T": 77, "h": 16, "w": 16}
    found = plans.find(unet, "full", dims, 120, "1.7")
    assert found.path.read_bytes().startswith(b"eng")
    assert found.path.parent == copy / "targets/trt-rtx/sm120/unet"
    job = next(j for j in library.jobs if Path(j.out).name == found.path.name and j.sm == 120)
    assert job.shapes["sample"] == [[1, 4, 16, 16]] * 3
    count = len(library.jobs)
    add_nvidia(copy, ["trt-rtx"], ask=ask)
    assert len(library.jobs) == count
    add_nvidia(copy, ["trt-rtx"], ask=Ask((75,)))
    assert {j.sm for j in library.jobs[count:]} == {75}
    assert plans.find(unet, "full", dims, 120, "1.7") == found  # the others stay
    assert open_bundle(copy, verify=True).targets["trt-rtx"].precisions == ("f16",)


def test_engines_of_another_library_are_built_again(copy, library):
    ask = Ask((89,))
    add_nvidia(copy, ["trt-rtx"], ask=ask)
    old = {e.path: e.path.read_bytes() for e in _engines(copy)}
    count, library.__version__ = len(library.jobs), "1.8"
    add_nvidia(copy, ["trt-rtx"], ask=ask)
    assert len(library.jobs) == 2 * count
    assert {e.version for e in _engines(copy)} == {"1.8"}
    assert all(e.path.read_bytes() != old[e.path] for e in _engines(copy))


def _engines(folder: Path):
    components = open_bundle(folder).components.values()
    return [e for c in components for e in c.typed["f16"].engines]


def test_a_graph_that_misses_its_gate_is_refused(mini_bundle, tmp_path):
    shutil.copytree(mini_bundle, tmp_path / "mini")
    before = open_bundle(tmp_path / "mini").id
    with pytest.raises(ParityFailure, match="on trt in f16") as caught:
        add_nvidia(tmp_path / "mini", ["trt"], gates={"f16": Gate(500.0)})
    assert open_bundle(tmp_path / "mini").id == before
    (kept,) = tmp_path.glob("mini.parity-*")
    assert str(kept) in caught.value.hint
    assert "PSNR" in repeat(kept)[0]
    assert not list(tmp_path.glob(".mini*"))


@pytest.mark.parametrize(
    ("options", "kind", "words", "hint"),
    [
        ({"targets": ["rtx"]}, UnknownName, "unknown target 'rtx'", "trt-rtx"),
        ({"precisions": ["f32"]}, UnknownName, "unknown precision 'f32'", "f16"),
        ({}, RequestError, "for which GPUs", "--sm 86,89,120; it knows 75,89,120"),
        ({"ask": Ask((90,))}, BackendUnavailable, "does not build for sm90", "--sm"),
        (
            {"ask": Ask((75,)), "precisions": ["bf16"]},
            BackendUnavailable,
            "sm75 has no bf16: it takes compute capability 8.0",
            "--precision f16",
        ),
        (
            {"ask": Ask((89, 75)), "precisions": ["f16", "fp8"]},
            BackendUnavailable,
            "sm75 has no fp8: it takes compute capability 8.9",
            "--sm 89",
        ),
        ({"ask": Ask((89,), Shapes(((33, 32),)))}, RequestError, "32x33", "--shapes"),
    ],
)
def test_what_is_refused_before_any_work(ready, library, options, kind, words, hint):
    with pytest.raises(SdengineError) as caught:
        add_nvidia(ready, **{"targets": ["trt-rtx"], **options})
    assert type(caught.value) is kind
    assert words in caught.value.message
    assert hint in caught.value.hint
    assert not library.jobs


def test_too_little_memory_is_said_with_the_number(copy, library, monkeypatch):
    monkeypatch.setattr(nvidia.machine, "available_memory", lambda: 10**8)
    with pytest.raises(SdengineError, match=r"needs about 0\.4 GB of memory; 0\.1 GB are free"):
        add_nvidia(copy, ["trt-rtx"], ask=Ask((89,)))
    assert not library.jobs


def test_int8_is_typed_from_the_quantised_network(copy):
    """Weights in int8: the typed graph is as far from float as the Q/DQ graph; the file is its."""
    bundle = open_bundle(copy)
    text = bundle.components["text_encoder"]
    twin = write_twin(text, copy / "text_encoder" / "int8", Choice({}))
    written = write_typed(replace(text, quantised={"int8": twin}), copy, copy, "int8")
    assert written.component.weights == twin.weights
    assert written.source == twin.weights_sha256
    feeds = {"input_ids": np.arange(154).reshape(2, 77)}
    exact, coarse, typed = (
        backend.load(network, Profile({"B": 2}, precision))(feeds)["last_hidden_state"]
        for backend, network, precision in (
            (OnnxRuntime(), text, "f32"),
            (OnnxRuntime(), twin, "f32"),
            (Emulated(), written.component, "int8"),
        )
    )
    assert 20 < distance(exact, coarse).psnr_db < 60
    assert distance(coarse, typed).psnr_db > distance(exact, coarse).psnr_db + 1
