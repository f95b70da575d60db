"""OpenVINO on the handmade network: numbers, the cache, telemetry, threads, and bad graphs."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sdengine.backends import machine, openvino_padding
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO
from sdengine.backends.openvino_rewrites import Rewrites
from sdengine.engine.errors import BackendError, BackendUnavailable, CorruptPart
from sdengine.engine.spec import Profile, TensorSpec

pytestmark = pytest.mark.ov
openvino = pytest.importorskip("openvino")

DIMS = {"B": 2, "h": 8, "w": 16}
LOG = "sdengine.backends"


@pytest.fixture(scope="module")
def feeds():
    random = np.random.default_rng(3)
    return {
        "sample": random.normal(size=(2, 4, 8, 16)).astype(np.float32),
        "timestep": np.array([1, 700], np.float32),
        "encoder_hidden_states": random.normal(size=(2, 77, 16)).astype(np.float32),
    }


@pytest.fixture
def unet(handmade, tmp_path):
    return handmade.component(tmp_path / "unet")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.mark.parametrize("dims", [{}, {"B": 2}, DIMS], ids=["free", "batch", "static"])
def test_answers(dims, unet, store, feeds, handmade):
    """Weights behind casts, at offsets in a safetensors file; a prologue with two outputs."""
    session = OpenVINO(store).load(unet, Profile(dims))
    wanted = handmade.answer(feeds)
    np.testing.assert_allclose(session(feeds)["out_sample"], wanted, atol=2e-6)
    view = session.bind({"encoder_hidden_states": feeds["encoder_hidden_states"]})
    rest = {k: feeds[k] for k in ("sample", "timestep")}
    np.testing.assert_allclose(view(rest)["out_sample"], wanted, atol=2e-6)


def test_bfloat16_is_asked_for_and_rounds(unet, store, feeds, handmade):
    backend = OpenVINO(store)
    if "bf16" not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16 instructions")
    wanted = handmade.answer(feeds)
    error = np.abs(backend.load(unet, Profile(DIMS, "bf16"))(feeds)["out_sample"] - wanted).max()
    assert 1e-5 < error < 0.05, "less would mean that it computed in float32"


def test_the_second_load_comes_from_the_cache(unet, store, feeds, monkeypatch, caplog):
    first = OpenVINO(store).load(unet, Profile(DIMS))(feeds)["out_sample"]
    assert sorted(e.what["component"] for e in store.entries()) == ["unet", "unet"]
    backend = OpenVINO(store)
    # In a process that cannot read graphs any more, only the cache can serve.
    for graph in unet.graphs.values():
        graph.path.unlink()
    with caplog.at_level(logging.INFO, LOG):
        session = backend.load(unet, Profile(DIMS))
    assert caplog.messages == []
    np.testing.assert_array_equal(session(feeds)["out_sample"], first)
    view = session.bind({"encoder_hidden_states": feeds["encoder_hidden_states"]})
    rest = {k: feeds[k] for k in ("sample", "timestep")}
    np.testing.assert_array_equal(view(rest)["out_sample"], first)
    session.close()


@pytest.mark.parametrize(
    "profile",
    [Profile({"B": 1}), Profile(DIMS, "bf16"), Profile()],
    ids=lambda p: p.label(),
)
def test_another_profile_is_another_entry(profile, unet, store):
    backend = OpenVINO(store)
    if profile.precision not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16 instructions")
    backend.load(unet, Profile(DIMS))
    backend.load(unet, profile)
    assert len(store.entries()) == 4


def test_rows_in_pairs_are_another_entry_of_what_they_change(unet, store):
    """Of the step, not of the prologue, which is given nothing that they have in common."""
    backend = OpenVINO(store)
    backend.load(unet, Profile(DIMS))
    graphs = [entry.what["graph"] for entry in store.entries()]
    backend.load(unet, Profile(DIMS, paired=True))
    (added,) = (entry for entry in store.entries() if "rows" in entry.what)
    assert len(store.entries()) == len(graphs) + 1
    assert added.what["graph"] == unet.graphs["full"].sha256


def test_other_weights_are_another_entry(handmade, store, feeds, tmp_path):
    """The graphs are byte for byte the same: only the weights' hash tells them apart."""
    one, two = (handmade.component(tmp_path / str(seed), seed) for seed in (0, 1))
    assert one.graphs["full"].sha256 == two.graphs["full"].sha256
    backend = OpenVINO(store)
    for seed, component in enumerate((one, two)):
        for _ in range(2):
            found = backend.load(component, Profile(DIMS))(feeds)["out_sample"]
            np.testing.assert_allclose(found, handmade.answer(feeds, seed), atol=2e-6)


@pytest.mark.parametrize("what", ["library", "processor", "threads"])
def test_a_stale_entry_is_compiled_again_and_says_why(
    what, unet, store, feeds, handmade, monkeypatch, caplog
):
    OpenVINO(store).load(unet, Profile(DIMS, threads=1))
    profile, backend = Profile(DIMS, threads=1), OpenVINO(store)
    backend.probe()
    if what == "library":
        monkeypatch.setattr(openvino, "get_version", lambda: "2027.1.0-1-abc")
    if what == "processor":
        monkeypatch.setattr(machine, "processor", lambda: "Another CPU avx2")
    if what == "threads":
        profile = Profile(DIMS, threads=2)
    with caplog.at_level(logging.INFO, LOG):
        session = backend.load(unet, profile)
    reasons = {
        "library": " -> 2027.1.0-1-abc",
        "processor": " -> Another CPU avx2",
        "threads": "threads 1 -> 2",
    }
    assert len(caplog.messages) == 2, "prologue and full"
    for message in caplog.messages:
        assert message.startswith("openvino unet (f32, B=2, h=8, w=16): compiling again: ")
        assert reasons[what] in message
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)


def test_a_corrupted_blob_is_built_again(unet, store, feeds, handmade, caplog):
    OpenVINO(store).load(unet, Profile(DIMS))
    for entry in store.entries():
        data = bytearray(entry.data.read_bytes())
        data[len(data) // 2] ^= 0xFF
        entry.data.write_bytes(data)
    session = OpenVINO(store).load(unet, Profile(DIMS))
    assert caplog.text.count("discarded: its hash is not the recorded one") == 2
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)
    assert store.verify() == []
    assert len(store.entries()) == 2


def test_a_blob_that_openvino_refuses_is_built_again(unet, store, feeds, handmade, caplog):
    """Whole by its hash, and still not what this library reads."""
    OpenVINO(store).load(unet, Profile(DIMS))
    for entry in store.entries():
        store.discard(entry.what, entry.made, "for the test")
        store.keep(entry.what, entry.made, lambda file: file.write(b"not a network " * 100))
    session = OpenVINO(store).load(unet, Profile(DIMS))
    assert caplog.text.count("OpenVINO refuses it") == 2
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(
    unet, tmp_path, feeds, handmade, caplog
):
    (tmp_path / "file").write_text("")
    session = OpenVINO(Store(tmp_path / "file")).load(unet, Profile(DIMS))
    assert caplog.text.count("cannot be kept") == 2
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)


def test_no_place_for_a_cache_does_not_stop_a_run(unet, feeds, handmade, monkeypatch):
    monkeypatch.setattr("sdengine.backends.openvino.open_store", lambda: None)
    session = OpenVINO().load(unet, Profile(DIMS))
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)


def test_a_disk_that_fills_while_a_blob_is_written(unet, store, feeds, handmade, caplog):
    """The library's stream swallows the error: what it wrote must not be taken for whole."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        session = OpenVINO(store).load(unet, Profile(DIMS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caplog.text.count("cannot be kept") == 2
    assert store.entries() == []
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)


def test_a_blob_outlives_its_eviction(unet, store, feeds):
    OpenVINO(store).load(unet, Profile(DIMS))
    session = OpenVINO(store).load(unet, Profile(DIMS))
    first = session(feeds)["out_sample"]
    store.prune(0)
    np.testing.assert_array_equal(session(feeds)["out_sample"], first)


def test_what_a_network_was_rewritten_in_is_told(monkeypatch):
    """By the cache: a change of one rewrite makes those networks anew that have it, no others."""
    float32, half, whole = (Rewrites(True, *kind) for kind in ((0, 0), (0, 1), (1, 1)))
    before = [r.recipes() for r in (float32, half, whole)]
    monkeypatch.setattr(openvino_padding, "RECIPE", "another")
    after = [r.recipes() for r in (float32, half, whole)]
    assert before[:2] == after[:2]
    assert before[2] != after[2]
    assert {k for k in before[2] if before[2][k] != after[2][k]} == {"padding"}
    elsewhere = Rewrites(False, True, True).recipes()
    assert {k for k, v in elsewhere.items() if v != "as it is"} == {"in float32"}


def test_threads(unet, store, monkeypatch):
    seen = []
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, config):
        seen.append(config["INFERENCE_NUM_THREADS"])
        return compile_model(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    monkeypatch.setattr(machine, "threads", lambda: 3)
    OpenVINO(store).load(unet, Profile(DIMS))
    OpenVINO(store).load(unet, Profile(DIMS, threads=1))
    assert seen == [3, 3, 1, 1]


def test_two_networks_are_not_compiled_at_once(unet, store, monkeypatch):
    """Each is in memory more than once while it is; reading from the cache is not held up."""
    inside, most = [], []
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, config):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return compile_model(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    backend = OpenVINO(store)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda b: backend.load(unet, Profile({**DIMS, "B": b})), (1, 2, 3, 4)))
    assert most == [1] * 8


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (Profile(DIMS), {"ENABLE_CPU_PINNING": False, "ENABLE_HYPER_THREADING": False}),
        (
            Profile(DIMS, pin=True, hyper_threads=True, fast_only=True),
            {
                "ENABLE_CPU_PINNING": True,
                "ENABLE_HYPER_THREADING": True,
                "SCHEDULING_CORE_TYPE": "PCORE_ONLY",
            },
        ),
        (Profile(DIMS, fast_only=False), {"SCHEDULING_CORE_TYPE": "ANY_CORE"}),
    ],
)
def test_the_plan_reaches_the_library(profile, expected, unet, store, feeds, handmade, monkeypatch):
    """And is accepted by it: the network is compiled and answers."""
    seen = []
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, config):
        seen.append(config)
        return compile_model(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    session = OpenVINO(store).load(unet, profile)
    np.testing.assert_allclose(session(feeds)["out_sample"], handmade.answer(feeds), atol=2e-6)
    assert len(seen) == 2
    for config in seen:
        assert expected.items() <= config.items()
        assert ("SCHEDULING_CORE_TYPE" in config) == (profile.fast_only is not None)


def test_a_graph_that_is_not_the_manifests(unet, store):
    full = unet.graphs["full"]
    graphs = {
        "full": dataclasses.replace(
            full, inputs=(*full.inputs, TensorSpec("mask", "float32", ("B",)))
        )
    }
    with pytest.raises(CorruptPart, match="the inputs of unet/full are keys, sample") as caught:
        OpenVINO(store).load(dataclasses.replace(unet, graphs=graphs), Profile())
    assert "export the bundle again" in caught.value.hint


def test_a_graph_that_is_none(unet, store):
    unet.graphs["full"].path.write_bytes(b"this is not ONNX")
    with pytest.raises(BackendError, match="openvino cannot load unet for f32 B2 h8 w16: ") as e:
        OpenVINO(store).load(unet, Profile(DIMS))
    assert "sdengine inspect --verify" in e.value.hint


def test_a_shape_that_the_graph_cannot_have(unet, store):
    """The graph fixes 4 channels: a spec that says 5 is found before anything runs."""
    full = unet.graphs["full"]
    wrong = tuple(
        TensorSpec(t.name, t.dtype, ("B", 5, "h", "w")) if t.name == "sample" else t
        for t in full.inputs
    )
    graphs = {**unet.graphs, "full": dataclasses.replace(full, inputs=wrong)}
    with pytest.raises(BackendError, match="openvino cannot load unet"):
        OpenVINO(store).load(dataclasses.replace(unet, graphs=graphs), Profile(DIMS))


def test_probe_follows_the_processor():
    probe = OpenVINO().probe()
    assert probe.ok
    assert probe.reason.startswith("OpenVINO 20")
    flags = set(machine.processor().split())
    floats = ("bf16", "f32") if {"avx512_bf16", "amx_bf16"} & flags else ("f32",)
    quick = {"avx512_vnni", "avx_vnni", "amx_int8"} & flags
    assert probe.precisions == (("int8", *floats) if quick else (*floats, "int8"))


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ("avx2 avx_vnni", ("int8", "f32")),
        ("avx512_bf16 avx512_vnni", ("int8", "bf16", "f32")),
        ("avx2", ("f32", "int8")),
    ],
)
def test_int8_is_first_where_it_is_quick(flags, precisions, monkeypatch):
    """Everywhere else it is allowed, and named behind the others."""
    abilities = ["FP32", "INT8", *(["BF16"] if "bf16" in flags else [])]

    class Core:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> list[str]:
            return abilities

    monkeypatch.setattr(machine, "processor", lambda: f"some processor {flags}")
    backend = OpenVINO()
    backend.__dict__["_core"] = Core()
    assert backend.probe().precisions == precisions
    assert backend._hint("int8") == ("bf16" if "bf16" in flags else "f32")
    assert backend._hint("f32") == "f32"


def alone(program: str, **env: str) -> str:
    """Standard output of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_telemetry():
    """`import openvino` alone loads openvino_telemetry, which sends; ours must not, nor must any
    socket be opened."""
    program = """
        import socket, sys, threading
        def refuse(*args, **kwargs):
            raise SystemExit("a socket was opened")
        socket.socket.connect = refuse
        from sdengine.backends.openvino import OpenVINO
        assert OpenVINO().probe().ok
        loaded = [m for m in sys.modules if m.startswith("openvino_telemetry")]
        print(loaded, sys.modules["openvino_telemetry"], threading.active_count())
        """
    assert alone(program) == "['openvino_telemetry'] None 1\n"


def test_a_missing_library():
    program = """
        import sys
        sys.modules["openvino"] = None
        from sdengine import backends
        from sdengine.backends.openvino import OpenVINO
        probe = OpenVINO().probe()
        print(probe.ok, probe.reason, probe.mend, sep="|")
        print(backends.choose().backend.name)
        """
    first, second = alone(program).splitlines()
    assert first == "False|the package openvino is not installed|pip install 'openvino>=2026.2'"
    assert second in ("onnxruntime", "torch")


def test_a_broken_library(tmp_path):
    (tmp_path / "openvino.py").write_text("raise OSError('libopenvino.so.2027: no such file')")
    program = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from sdengine.backends.openvino import OpenVINO
        print(OpenVINO().probe().reason)
        """
    assert alone(program) == "openvino cannot be imported: libopenvino.so.2027: no such file\n"


def test_unavailable_is_said_by_load(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailable, match="openvino cannot run here") as caught:
        OpenVINO().load(unet, Profile())
    assert caught.value.hint == "pip install 'openvino>=2026.2'"
