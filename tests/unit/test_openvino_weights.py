"""Weights widened on disk: the same numbers, and what the kernel counts while they are packed."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sdengine.backends import openvino_weights
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO, library
from sdengine.backends.openvino_weights import widen
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.ov
pytest.importorskip("openvino")

DIMS = {"B": 2, "h": 8, "w": 16}
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel counts pages")


@pytest.fixture
def unet(handmade, tmp_path):
    return handmade.component(tmp_path / "unet")


@pytest.fixture
def feeds():
    random = np.random.default_rng(3)
    return {
        "sample": random.normal(size=(2, 4, 8, 16)).astype(np.float32),
        "timestep": np.array([1, 700], np.float32),
        "encoder_hidden_states": random.normal(size=(2, 77, 16)).astype(np.float32),
    }


def converts(model):
    """Nodes that widen a constant."""
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "Convert"
        and node.input_value(0).get_node().get_type_name() == "Constant"
    ]


def read(unet, graph="full"):
    return library().Core().read_model(unet.graphs[graph].path)


@pytest.mark.parametrize("limit", [0, None], ids=["not kept", "kept"])
def test_a_network_gives_the_same_bit_for_bit(limit, unet, feeds, tmp_path, monkeypatch):
    """Kept in the cache or not: the weights' mapping must live as long as what reads it."""
    plain = OpenVINO(Store(tmp_path / "a", limit=0)).load(unet, Profile(DIMS))(feeds)["out_sample"]
    done = []

    def always(model, weights, folder):
        done.append(widen(model, weights, folder, large=1))
        return done[-1]

    monkeypatch.setattr("sdengine.backends.openvino.widen", always)
    session = OpenVINO(Store(tmp_path / "b", limit=limit)).load(unet, Profile(DIMS))
    np.testing.assert_array_equal(session(feeds)["out_sample"], plain)
    assert len(done) == 2, "prologue and full"
    assert None not in done


def test_constants_take_the_place_of_what_widens_them(unet, tmp_path):
    model = read(unet)
    names = converts(model)
    assert len(names) == 2
    mapped = widen(model, unet.weights, tmp_path / "new", large=1)
    assert converts(model) == []
    by_name = {node.get_friendly_name(): node for node in model.get_ops()}
    stored = dict(openvino_weights.each_tensor(unet.weights, ["net.conv.weight"]))
    (name,) = (n for n in names if n.startswith("net.conv.weight"))
    np.testing.assert_array_equal(by_name[name].data, stored["net.conv.weight"])
    assert mapped is not None
    assert list((tmp_path / "new").iterdir()) == [], "a file without a name: nothing to clean up"


def test_a_small_network_is_left_alone(unet, tmp_path):
    model = read(unet)
    assert widen(model, unet.weights, tmp_path / "new") is None
    assert len(converts(model)) == 2


@pytest.mark.parametrize("what", ["full", "no folder"])
def test_a_disk_without_room_is_said_and_costs_nothing_else(
    what, unet, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "new"
    if what == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(openvino_weights.shutil, "disk_usage", lambda path: usage)
    else:
        folder.write_text("a file is in the way")
    model = read(unet)
    with caplog.at_level(logging.INFO, "sdengine.backends"):
        assert widen(model, unet.weights, folder, large=1) is None
    assert len(converts(model)) == 2
    assert "weights are widened in memory" in caplog.text


@linux
def test_memory_holds_the_packed_weights_alone(tmp_path):
    """A product of 64 MiB in half precision: 128 MiB widened, 128 MiB packed in float32."""
    program = f"""
        import json, struct, sys
        from pathlib import Path
        import numpy as np, onnx
        from onnx import TensorProto, helper
        from sdengine.backends.mapping import Mapped
        from sdengine.backends.openvino import library
        from sdengine.backends.openvino_weights import widen

        folder, side = Path({str(tmp_path)!r}), 5792
        header = json.dumps({{"w": {{"dtype": "F16", "shape": [side, side],
                                     "data_offsets": [0, 2 * side * side]}}}}).encode()
        file = folder / "w.safetensors"
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.write(np.random.default_rng(0).standard_normal((side, side)).astype(np.float16))
        weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[side, side])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file.name), ("offset", 8 + len(header)),
                           ("length", 2 * side * side)):
            weight.external_data.add(key=key, value=str(value))
        info = helper.make_tensor_value_info
        nodes = [helper.make_node("Cast", ["w"], ["w/f32"], to=TensorProto.FLOAT),
                 helper.make_node("MatMul", ["x", "w/f32"], ["y"])]
        graph = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, [8, side])],
                                  [info("y", TensorProto.FLOAT, [8, side])], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (folder / "g.onnx").write_bytes(model.SerializeToString())

        def held():  # of its own: pages of the file can be given back at any time
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

        core = library().Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")
        read = core.read_model(folder / "g.onnx")
        before = held()
        if sys.argv[1] == "on disk":
            mapped = widen(read, file, folder, large=1)
            with mapped.passing():
                compiled = core.compile_model(read, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
        else:
            compiled = core.compile_model(read, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
        print(held() - before)
        """

    def took(how):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), how],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout) >> 20

    assert took("on disk") < took("in memory") - 64, "MiB"
