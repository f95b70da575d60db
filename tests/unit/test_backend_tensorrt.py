"""The TensorRT backend on a GPU of host memory, with the library's runtime played by ONNX Runtime.

What a wrong address, a call too early or a missing wait would do, it does here: fresh device memory
is NaN, and nothing runs before it is waited for. The reference is the onnxruntime backend.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.backends import plans, tensorrt
from sdengine.backends.cache import Store
from sdengine.backends.cuda.device import Facts
from sdengine.backends.cuda.engines import DeviceArray, Lanes, Messages, deserialize, refit
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import (
    ArtifactMismatch,
    BackendError,
    BackendUnavailable,
    FeedMismatch,
    MissingPart,
    SessionClosed,
)
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.spec import Engine, Profile

from .. import fake_tensorrt
from ..fake_cuda import FakeDevice

pytestmark = pytest.mark.ort

UNET = {"B": 2, "T": 77, "h": 16, "w": 16}
FACTS = Facts(0, "Fake GPU", (8, 9), (12, 4), 24 << 30, 20 << 30)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


class Machine:
    """A GPU, a library, a cache, and how often something was built."""

    def __init__(
        self, folder, store, kind=tensorrt.TensorRT, version="11.4.0", strip=False, **facts
    ):
        self.device = FakeDevice(folder, replace(FACTS, **facts))
        self.store, self.built = store, []
        name = plans.LIBRARIES[kind.target]
        self.library = fake_tensorrt.library(self.device, version, name)
        self.opened = []

        def open_device(index):
            self.opened.append(index)
            return self.device

        self.backend = kind(store, open_device, self.library, self.build, strip)

    def build(self, library, graph, dims, facts, strip):
        self.built.append(f"{graph.name} without weights" if strip else graph.name)
        return fake_tensorrt.plan_of(library, graph, dims, facts, strip)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def machine(folder, store):
    return Machine(folder, store)


def feeds(seed=0, batch=2):
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((batch, 4, 16, 16)).astype(np.float32),
        "timestep": np.full(batch, 300.0, np.float32),
        "encoder_hidden_states": random.standard_normal((batch, 77, 96)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def reference(bundle):
    session = backends.get("onnxruntime").load(bundle.components["unet"], Profile(UNET))
    yield session
    session.close()


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 4, "cache": 2, "sampler": "euler_a"}])
def test_a_picture(options, machine, bundle):
    request = {"prompt": "a red fox", "seed": 3, **options}
    found = Pipeline(bundle, api.EngineSessions(bundle, machine.backend, "f32", 1), {})
    wanted = Pipeline(bundle, api.EngineSessions(bundle, backends.get("onnxruntime"), "f32", 1), {})
    steps = []
    with found, wanted:
        result = found(**request, on_step=lambda p: steps.append(list(machine.device.calls)))
        other = np.asarray(wanted(**request).image, float)
    assert np.abs(np.asarray(result.image, float) - other).max() <= 2
    assert len(result.timings.rows) == options["steps"] == len(steps)
    between = steps[-1][len(steps[0]) :]
    assert ("wait",) not in between, "the host ran ahead"
    assert sum(c[0] == "read" for c in between) == 0
    del result
    gc.collect()
    assert (machine.device.memory, machine.device.graphs) == ({}, {})


def test_a_run_that_is_saved_after_each_step_goes_through_the_loop(machine, bundle):
    """And its cached features stay on the device: only x and what a state needs are read."""
    options = {"prompt": "a red fox", "seed": 3, "steps": 4, "cache": 2}
    pipe = Pipeline(bundle, api.EngineSessions(bundle, machine.backend, "f32", 1), {})
    with pipe:
        whole = np.asarray(pipe(**options).image, float)
        machine.device.calls.clear()
        saved = []
        (*_, result) = pipe.stream(on_state=saved.append, **options)
    assert np.abs(np.asarray(result.image, float) - whole).max() <= 2
    assert not any(c[0] == "replay" for c in machine.device.calls)
    assert saved[0].features["both.0,0.features0"].shape == (2, 64, 16, 16)


def test_features_are_handles(machine, bundle, reference):
    session = machine.backend.load(bundle.components["unet"], Profile(UNET))
    values = feeds()
    deep = session.graph("deep")(values)
    assert isinstance(deep["features0"], DeviceArray)
    wanted = reference.graph("deep")(values)
    near(np.asarray(deep["features0"]), wanted["features0"])
    near(np.asarray(deep["features0"][1:]), wanted["features0"][1:])
    machine.device.calls.clear()
    found = session.graph("shallow0")({**values, "features0": deep["features0"]})["out_sample"]
    size = wanted["features0"].nbytes
    assert ("read", size) not in machine.device.calls
    assert ("write", size) not in machine.device.calls
    values |= {"features0": wanted["features0"]}
    near(found, reference.graph("shallow0")(values)["out_sample"])
    # and an ordinary array in its place, after a handle was there
    near(session.graph("shallow0")(values)["out_sample"], found)
    with pytest.raises(FeedMismatch, match=r"shape \[1, 64, 16, 16\], expected \[2"):
        session.graph("shallow0")({**values, "features0": deep["features0"][1:]})
    session.close()


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_results_belong_to_the_caller_and_bound_sessions_are_apart(machine, bundle, reference):
    session = machine.backend.load(bundle.components["unet"], Profile(UNET))
    one, two = feeds(1), feeds(2)
    first, second = (
        session.bind({"encoder_hidden_states": v["encoder_hidden_states"]}) for v in (one, two)
    )
    rest = [{k: v[k] for k in ("sample", "timestep")} for v in (one, two)]
    a = first(rest[0])["out_sample"]
    kept = a.copy()
    near(second(rest[1])["out_sample"], reference(two)["out_sample"])
    near(first(rest[1])["out_sample"], reference({**one, **rest[1]})["out_sample"])
    np.testing.assert_array_equal(a, kept)
    near(a, reference(one)["out_sample"])
    session.close()
    with pytest.raises(SessionClosed):
        first(rest[0])


def test_one_set_of_weights_for_sessions_of_several_threads(machine, bundle, reference):
    component, found = bundle.components["unet"], {}
    sessions = [machine.backend.load(component, Profile(UNET)) for _ in range(3)]
    barrier = threading.Barrier(3)

    def work(k):
        barrier.wait()
        found[k] = sessions[k](feeds(k))["out_sample"]

    lock, device = threading.Lock(), machine.device
    drain = device.drain
    device.drain = lambda: _locked(lock, drain)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        near(found[k], reference(feeds(k))["out_sample"])
    assert sorted(machine.built) == ["full", "prologue"], "opened once"
    assert len(device.streams) == 3, "a lane for each thread"
    for session in sessions:
        session.close()
    gc.collect()
    assert (device.memory, device.streams) == ({}, set())


def _locked(lock, function):
    with lock:
        function()


def load(machine, bundle, dims=UNET, component=None, **profile):
    component = bundle.components["unet"] if component is None else component
    return machine.backend.load(component, Profile(dims, **profile)).graph("full")


STALE = {
    "GPU": ({"name": "Other GPU"}, "GPU Fake GPU -> Other GPU"),
    "kind of GPU": ({"capability": (8, 6)}, "device sm89 -> sm86"),
    "driver": ({"driver": (12, 8)}, r"driver CUDA 12\.4 -> CUDA 12\.8"),
    "version": ({"version": "11.5.0"}, r"version 11\.4\.0 -> 11\.5\.0"),
}


@pytest.mark.parametrize("what", STALE)
def test_a_stale_engine_is_built_again_and_the_reason_said(what, folder, store, bundle, caplog):
    change, said = STALE[what]
    caplog.set_level(logging.INFO, "sdengine.backends")
    for fresh in (True, False):  # the second finds what the first kept
        machine = Machine(folder, store)
        load(machine, bundle)
        assert bool(machine.built) == fresh
    caplog.clear()
    other = Machine(folder, store, **change)
    load(other, bundle)
    assert other.built == ["prologue", "full"]
    assert [r for r in caplog.messages if "compiling again" in r]
    assert any(re.search(said, r) for r in caplog.messages), caplog.messages


def test_other_weights_or_shapes_are_other_engines(folder, store, bundle):
    load(Machine(folder, store), bundle)
    shape = Machine(folder, store)
    load(shape, bundle, {**UNET, "h": 8})
    assert shape.built == ["full"], "the prologue has no h"
    weights = Machine(folder, store)
    load(weights, bundle, component=replace(bundle.components["unet"], weights_sha256="0" * 64))
    assert weights.built == ["prologue", "full"]


def test_what_lies_in_the_cache_and_is_no_engine_is_built_again(folder, store, bundle, caplog):
    load(Machine(folder, store), bundle)
    for entry in store.entries():
        stamp = entry.data.stat()
        entry.data.write_bytes(b"?" * stamp.st_size)
        record = entry.folder / "entry.json"
        text = record.read_text().replace(entry.sha256, _sha256(entry.data))
        record.write_text(text)
    again = Machine(folder, store)
    load(again, bundle)
    assert again.built == ["prologue", "full"]
    assert any("magicTag" in m and "discarded" in m for m in caplog.messages)
    said = [m for m in caplog.messages if "discarded" in m]
    assert not any("something that follows" in m for m in said), "the first is the cause"


def _sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def ahead_of_time(bundle, tmp_path, content=None, sm=89, version="1.7.1"):
    """The UNet with a typed network that has engines for TensorRT-RTX."""
    unet = bundle.components["unet"]
    engines = []
    for name in ("prologue", "full"):
        spans = plans.spans(unet.graphs[name], UNET)
        path = tmp_path / f"{name}.engine"
        facts = replace(FACTS, capability=divmod(sm, 10))
        plan = fake_tensorrt.plan_of("tensorrt_rtx", unet.graphs[name], spans, facts)
        path.write_bytes(plan if content is None else content)
        due = plans.fingerprint(
            plans.what(unet, name, spans), plans.made("tensorrt_rtx", version, sm)
        )
        engines.append(Engine(plans.RTX, name, path, sm, spans, version, due))
    return replace(unet, typed={"f16": replace(unet, engines=tuple(engines))})


def rtx(folder, store, **options):
    return Machine(folder, store, tensorrt.TensorRTRTX, **{"version": "1.7.1", **options})


def test_engines_of_the_bundle_are_opened_as_they_are(folder, store, bundle, tmp_path, reference):
    machine = rtx(folder, store)
    component = ahead_of_time(bundle, tmp_path)
    session = load(machine, bundle, component=component, precision="f16")
    near(session(feeds())["out_sample"], reference(feeds())["out_sample"])
    assert machine.built == []
    assert store.entries() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capability": (8, 6)}, "was built for sm89; this GPU is sm86"),
        ({"version": "1.8.0"}, "was built with trt-rtx 1.7.1; here is 1.8.0"),
    ],
)
def test_engines_for_another_gpu_are_told_and_built_here(
    change, said, folder, store, bundle, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "sdengine.backends")
    machine = rtx(folder, store, **change)
    load(machine, bundle, component=ahead_of_time(bundle, tmp_path), precision="f16")
    assert machine.built == ["prologue", "full"]
    assert any(said in m for m in caplog.messages)


def test_a_file_that_is_no_engine_is_told_and_built_here(folder, store, bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sdengine.backends")
    machine = rtx(folder, store)
    component = ahead_of_time(bundle, tmp_path, content=b"not an engine")
    load(machine, bundle, component=component, precision="f16")
    assert machine.built == ["prologue", "full"]
    assert any("13 bytes) cannot be opened here: Serialization" in m for m in caplog.messages)


def test_an_engine_that_was_built_and_cannot_be_opened_is_an_error(folder, store, bundle):
    machine = Machine(folder, store)
    machine.backend._build = lambda *_: b"nonsense"
    with pytest.raises(ArtifactMismatch, match="magicTag") as caught:
        load(machine, bundle)
    assert "sdengine export BUNDLE --target trt" in caught.value.hint
    assert "on sm89" in caught.value.hint


# Engines without weights


def test_a_stripped_engine_is_refitted_at_every_start(folder, store, bundle, reference):
    """Built once, kept small; each start reads it, gives it the weights, and then runs it."""
    graphs = bundle.components["unet"].graphs
    for fresh in (True, False):
        machine = Machine(folder, store, strip=True)
        session = machine.backend.load(bundle.components["unet"], Profile(UNET))
        near(session(feeds())["out_sample"], reference(feeds())["out_sample"])
        names = ["prologue", "full"]
        assert machine.built == [f"{n} without weights" for n in names if fresh]
        wanted = []
        for name in names:
            wanted += [("open", name), ("read weights", str(graphs[name].path)), ("refit", name)]
        assert machine.library.done == wanted
        session.close()
    recipes = {e.what["recipe"] for e in store.entries()}
    assert recipes == {plans.STRIPPED}


def test_an_engine_that_was_not_refitted_does_not_run(folder, store, bundle, monkeypatch):
    """The fake is strict: without this, the test above could pass with no refit at all."""
    monkeypatch.setattr(tensorrt, "refit", lambda *_: None)
    machine = Machine(folder, store, strip=True)
    with pytest.raises(BackendError, match="refuses the call"):
        machine.backend.load(bundle.components["unet"], Profile(UNET))(feeds())


def test_a_weight_that_is_missing_is_told_and_a_whole_engine_built(folder, store, bundle, caplog):
    caplog.set_level(logging.INFO, "sdengine.backends")
    machine = Machine(folder, store, strip=True)
    machine.library.lost = ["a.weight", "b.weight", "c.weight", "d.weight"]
    session = machine.backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
    assert session({"input_ids": np.zeros((1, 77), np.int64)})["last_hidden_state"].any()
    assert machine.built == ["full without weights", "full"]
    said = "no values for a.weight, b.weight, c.weight and 1 more"
    assert any("with its weights, for" in m and said in m for m in caplog.messages)
    assert [e.what["recipe"] for e in store.entries()] == [plans.RECIPE]


def test_what_a_refit_refuses_has_a_next_step(machine, bundle):
    library, graph = machine.library, bundle.components["text_encoder"].graphs["full"]
    spans = plans.spans(graph, {"B": 1})
    plan = fake_tensorrt.plan_of("tensorrt", graph, spans, FACTS, True)
    messages = Messages()
    runtime = library.Runtime(messages.logger(library))
    engine = deserialize(runtime, messages, plan, "text_encoder/full", "hint")
    library.lost = ["a.weight"]
    with pytest.raises(
        ArtifactMismatch, match=r"given those of full\.onnx: no values for a\.w"
    ) as e:
        refit(library, messages, engine, graph, "text_encoder/full")
    assert "leave SDENGINE_TRT=strip out" in e.value.hint
    assert "--verify" in e.value.hint
    library.lost, library.refits = [], False
    with pytest.raises(ArtifactMismatch, match="weights of another size"):
        refit(library, messages, engine, graph, "text_encoder/full")


def test_a_library_that_cannot_strip_builds_whole_engines(folder, store, bundle, caplog):
    """As TensorRT-RTX 1.7.1 without a GPU."""
    caplog.set_level(logging.INFO, "sdengine.backends")
    machine = Machine(folder, store, strip=True)

    def build(library, graph, dims, facts, strip):
        if strip:
            raise BackendError("graph_jit.cpp: CHECK(status == CUDA_SUCCESS)", hint="none")
        return machine.build(library, graph, dims, facts, strip)

    machine.backend._build = build
    load(machine, bundle)
    assert machine.built == ["prologue", "full"]
    assert any("CUDA_SUCCESS" in m for m in caplog.messages)


def test_stripping_is_asked_for_by_name(monkeypatch):
    assert not tensorrt.TensorRT()._strip
    monkeypatch.setenv("SDENGINE_TRT", "strip")
    assert tensorrt.TensorRT()._strip


def test_too_little_memory_is_said_before_the_build(folder, store, bundle):
    machine = Machine(folder, store, free=100 << 20)
    with pytest.raises(
        BackendError, match=r"about 512 MiB .*; 100 of 24576 MiB are free"
    ) as caught:
        load(machine, bundle)
    assert "nvidia-smi" in caught.value.hint
    assert machine.built == []


def test_a_gpu_that_is_too_old(folder, store, bundle):
    machine = Machine(folder, store, capability=(7, 0))
    probe = machine.backend.probe()
    assert not probe.ok
    assert "compute capability is 7.0, the least is 7.5" in probe.reason
    with pytest.raises(BackendUnavailable, match=r"7\.0") as caught:
        load(machine, bundle)
    assert "sdengine doctor" in caught.value.hint


def test_no_typed_graphs(machine, bundle):
    with pytest.raises(MissingPart, match="no strongly typed graphs in f16") as caught:
        load(machine, bundle, precision="f16")
    assert "--target trt" in caught.value.hint


def test_open_sizes_need_an_engine_for_ranges(machine, bundle):
    with pytest.raises(BackendError, match="unet/prologue for fixed sizes; B, T is open") as caught:
        load(machine, bundle, {})
    assert "ahead of time" in caught.value.hint


def test_what_the_engine_refuses(machine, bundle):
    session = machine.backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
    runner = session.runner
    runner._context.execute_async_v3 = lambda stream: False
    with pytest.raises(BackendError, match="refuses the call: it does not say why") as caught:
        session({"input_ids": np.zeros((1, 77), np.int64)})
    assert "sdengine doctor" in caught.value.hint


def test_the_device_is_chosen_by_the_profile(folder, store, bundle):
    machine = Machine(folder, store)
    load(machine, bundle, device="cuda:1")
    assert machine.opened == [0, 1], "the first for the probe"
    for device in ("cuda:x", "tpu", "cuda:", "CPU"):
        with pytest.raises(BackendUnavailable, match="is no GPU that CUDA knows") as caught:
            load(machine, bundle, device=device)
        assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


def test_without_the_library_or_the_driver(monkeypatch, store):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    probe = tensorrt.TensorRT(store).probe()
    assert (probe.ok, probe.mend) == (False, tensorrt.TensorRT.mend)
    assert "tensorrt is not installed" in probe.reason

    def no_driver(index):
        raise BackendUnavailable("there is no NVIDIA driver", hint="install it")

    probe = tensorrt.TensorRT(store, no_driver, SimpleNamespace(__version__="11")).probe()
    assert (probe.ok, probe.mend) == (False, "install it")
    assert probe.reason == "there is no NVIDIA driver; this runtime is unproved on H100 and H200"


def test_doctor_says_that_it_is_unproved(machine):
    assert "unproved on H100 and H200" in machine.backend.probe().reason


def test_the_real_library_knows_all_that_is_called_and_refuses_what_is_no_engine():
    """TensorRT-RTX imports and deserialises without a driver, up to its own error."""
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    context = tensorrt_rtx.IExecutionContext
    for name in ("set_input_shape", "get_tensor_shape", "set_tensor_address", "set_device_memory",
                 "execute_async_v3", "is_stream_capturable"):  # fmt: skip
        assert hasattr(context, name), name
    assert hasattr(tensorrt_rtx.ICudaEngine, "device_memory_size_v2")
    assert hasattr(tensorrt_rtx.ExecutionContextAllocationStrategy, "USER_MANAGED")
    messages = Messages()
    runtime = tensorrt_rtx.Runtime(messages.logger(tensorrt_rtx))
    with pytest.raises(ArtifactMismatch, match=r"300 bytes.*Serialization") as caught:
        deserialize(runtime, messages, b"abc" * 100, "unet/full", "build it again")
    assert caught.value.hint == "build it again"


def real(folder, store, **facts):
    """TensorRT-RTX itself, on a GPU of host memory."""
    library = pytest.importorskip("tensorrt_rtx")
    device = FakeDevice(folder, replace(FACTS, **facts))
    return tensorrt.TensorRTRTX(store, lambda index: device, library)


def test_the_real_builder_builds_and_the_real_runtime_asks_for_a_driver(folder, store, bundle):
    """Built in a process of its own, kept in the cache, and opened as far as it goes here."""
    backend = real(folder, store)
    with pytest.raises(BackendUnavailable, match=r"driver is too old .*or missing") as caught:
        backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
    assert "nvidia-smi" in caught.value.hint
    (entry,) = store.entries()
    assert entry.what["component"] == "text_encoder"
    assert (entry.made["device"], entry.made["GPU"]) == ("sm89", "Fake GPU")
    assert entry.size > bundle.components["text_encoder"].weights.stat().st_size


def test_the_real_builder_has_no_sm90(folder, store, bundle):
    """What an H100 is told."""
    backend = real(folder, store, capability=(9, 0))
    with pytest.raises(BackendUnavailable, match="does not build for sm90") as caught:
        backend.load(bundle.components["text_encoder"], Profile({"B": 1}))
    assert "sdengine doctor" in caught.value.hint
    assert store.entries() == []


def test_lanes_close_with_their_last_user(folder):
    device = FakeDevice(folder)
    lanes, one, two = Lanes(device), object(), object()
    lanes.enter(one)
    lanes.enter(two)
    assert lanes.mine() is lanes.mine()
    lanes.leave(one)
    assert len(device.streams) == 1
    lanes.leave(two)
    lanes.leave(two)
    assert device.streams == set()
