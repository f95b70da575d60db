"""Weights over files: the same numbers, and what the kernel counts while they are packed."""

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
from sdengine.backends.openvino_weights import remap, widen
from sdengine.engine.spec import Profile
from sdengine.engine.weights import read_header

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


@pytest.fixture
def whole(tmp_path):
    """A file with the int8 tensors `a` and `b`, and a network of both; of `c`, which the file has
    in another shape; and of `d`, which it does not have."""
    from openvino import opset13 as ops
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    kept = {n: rng.integers(-127, 128, (4, 4)).astype(np.int8) for n in "abcd"}
    file = tmp_path / "w.safetensors"
    save_file({"a": kept["a"], "b": kept["b"], "c": kept["c"][:2].copy()}, file)
    total = x = ops.parameter((2, 4), np.float32)
    for name, values in kept.items():
        constant = ops.constant(np.zeros_like(values) if name in "ab" else values)
        constant.set_friendly_name(f"{name}/int8")
        total = ops.matmul(total, ops.convert(constant, "f32"), False, True)
    return library().Model([ops.result(total)], [x], "whole"), file, kept


def held(model):
    """friendly name -> the int8 constant of a model."""
    constants = [n for n in model.get_ops() if n.get_type_name() == "Constant"]
    return {n.get_friendly_name(): n.data for n in constants if n.data.dtype == np.int8}


def test_constants_in_int8_lie_in_the_file(whole):
    model, file, kept = whole
    mapped = remap(model, file, large=1)
    found, places = held(model), read_header(file)
    start = mapped.data.ctypes.data
    for name, values in kept.items():
        np.testing.assert_array_equal(found[f"{name}/int8"], values)
    for name in "ab":
        assert found[f"{name}/int8"].ctypes.data == start + places[name].offset
    for name in "cd":
        assert not 0 <= found[f"{name}/int8"].ctypes.data - start < mapped.data.size
    x = np.random.default_rng(1).standard_normal((2, 4), np.float32)
    wanted = x
    for values in kept.values():
        wanted = wanted @ values.T.astype(np.float32)
    run = library().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(run({0: x})[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("why", ["small", "no such call", "no mapping"])
def test_where_int8_stays_as_openvino_reads_it(why, whole, monkeypatch, caplog):
    model, file, _ = whole
    if why == "no such call":
        monkeypatch.delattr(openvino_weights.mmap, "MADV_DONTNEED")
    if why == "no mapping":

        def refuse(path):
            raise OSError("no room in the address space")

        monkeypatch.setattr(openvino_weights, "Mapped", refuse)
    with caplog.at_level(logging.INFO, "sdengine.backends"):
        assert remap(model, file, large=33 if why == "small" else 1) is None
    assert not held(model)["a/int8"].any(), "as it was"
    assert ("no room in the address space" in caplog.text) == (why == "no mapping")


@linux
def test_pages_of_int8_weights_go_while_they_are_packed(tmp_path):
    """A convolution's 64 MiB: of OpenVINO's mapping they stay, of ours they do not."""
    program = f"""
        import sys
        from pathlib import Path
        import numpy as np, onnx
        from onnx import TensorProto, helper
        from safetensors.numpy import save_file
        from sdengine.backends.openvino import library
        from sdengine.backends.openvino_weights import remap
        from sdengine.engine.weights import read_header

        folder, side = Path({str(tmp_path)!r}), 8192
        file = folder / "w.safetensors"
        rng = np.random.default_rng(0)
        save_file({{"w": rng.integers(-127, 128, (side, side), np.int8)}}, file)
        weight = onnx.TensorProto(name="w/int8", data_type=TensorProto.INT8, dims=[side, side])
        weight.data_location = TensorProto.EXTERNAL
        stored = read_header(file)["w"]
        for key, value in (("location", file.name), ("offset", stored.offset),
                           ("length", stored.nbytes)):
            weight.external_data.add(key=key, value=str(value))
        info, make = helper.make_tensor_value_info, helper.make_tensor
        parts = [weight, make("s", TensorProto.FLOAT, [side], np.full(side, 0.01, np.float32)),
                 make("t", TensorProto.FLOAT, [], [0.02]), make("z", TensorProto.INT8, [], [0])]
        nodes = [helper.make_node("DequantizeLinear", ["w/int8", "s"], ["w"], axis=1),
                 helper.make_node("QuantizeLinear", ["x", "t", "z"], ["q"]),
                 helper.make_node("DequantizeLinear", ["q", "t", "z"], ["x8"]),
                 helper.make_node("MatMul", ["x8", "w"], ["y"])]
        graph = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, [8, side])],
                                  [info("y", TensorProto.FLOAT, [8, side])], parts)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (folder / "g.onnx").write_bytes(model.SerializeToString())

        def mapped():
            return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) << 10

        core = library().Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")
        options = {{"INFERENCE_PRECISION_HINT": "f32"}}
        read = core.read_model(folder / "g.onnx")
        before = mapped()
        if sys.argv[1] == "ours":
            source = remap(read, file, large=1)
            with source.passing():
                compiled = core.compile_model(read, "CPU", options)
        else:
            compiled = core.compile_model(read, "CPU", options)
        print(mapped() - before)
        """
    theirs, ours = (int(run_apart(program, how)) >> 20 for how in ("theirs", "ours"))
    assert ours < theirs - 48, "MiB"


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

    on_disk, in_memory = (int(run_apart(program, how)) >> 20 for how in ("on disk", "in memory"))
    assert on_disk < in_memory - 64, "MiB"


def run_apart(program, how):
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
