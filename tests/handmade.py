"""A small network written by hand: prologue and full graph over one safetensors file.

It has what bundles have: weights in float16 behind a Cast, external data at offsets in a
safetensors file, named dimensions, a prologue. `answer` is the same arithmetic in numpy.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from sdengine.engine.spec import Component, ComponentSpec, Graph, TensorSpec

C, W, T = 8, 16, 77
SAMPLE = TensorSpec("sample", "float32", ("B", 4, "h", "w"))
TIME = TensorSpec("timestep", "float32", ("B",))
TEXT = TensorSpec("encoder_hidden_states", "float32", ("B", T, W))
KEYS = TensorSpec("keys", "float32", ("B", T, C))
VALUES = TensorSpec("values", "float32", ("B", T, 4))
OUT = TensorSpec("out_sample", "float32", ("B", 4, "h", "w"))


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "net.conv.weight": (C, 4, 1, 1),
        "net.out.weight": (4, C, 1, 1),
        "net.k.weight": (C, W),
        "net.v.weight": (4, W),
    }
    return {n: (random.normal(size=s) / 3).astype(np.float16) for n, s in shapes.items()}


def answer(feeds: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """out_conv(tanh((conv(sample) + mean keys) * (1 + t / 1000))) + mean values, in float64."""
    w = {n: v.astype(np.float64) for n, v in weights(seed).items()}
    keys = feeds["encoder_hidden_states"] @ w["net.k.weight"].T
    values = feeds["encoder_hidden_states"] @ w["net.v.weight"].T
    a = np.einsum("oc,bchw->bohw", w["net.conv.weight"][:, :, 0, 0], feeds["sample"])
    scale = 1 + feeds["timestep"].astype(np.float64)[:, None, None, None] / 1000
    hidden = np.tanh((a + keys.mean(1)[:, :, None, None]) * scale)
    out = np.einsum("oc,bchw->bohw", w["net.out.weight"][:, :, 0, 0], hidden)
    return out + values.mean(1)[:, :, None, None]


def component(folder: Path, seed: int = 0) -> Component:
    """Written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    places = _write_weights(folder / "weights.safetensors", weights(seed))
    graphs = {
        "prologue": _model(
            [TEXT], [VALUES, KEYS], _prologue(), ["net.k.weight", "net.v.weight"], places, {}
        ),
        "full": _model(
            [SAMPLE, TIME, KEYS, VALUES],
            [OUT],
            _full(),
            ["net.conv.weight", "net.out.weight"],
            places,
            {"axis1": [1], "axes23": [2, 3], "axes123": [1, 2, 3]},
        ),
    }
    signatures = {
        "prologue": ([TEXT], [KEYS, VALUES]),
        "full": ([SAMPLE, TIME, KEYS, VALUES], [OUT]),
    }
    made = {}
    for name, model in graphs.items():
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        inputs, outputs = signatures[name]
        made[name] = Graph(name, path, _sha256(path), tuple(inputs), tuple(outputs))
    sha256 = _sha256(folder / "weights.safetensors")
    key = hashlib.sha256("".join([sha256, *(g.sha256 for g in made.values())]).encode()).hexdigest()
    spec = ComponentSpec("unet", (SAMPLE, TIME, TEXT), (OUT,))
    return Component(spec, made, folder / "weights.safetensors", sha256, {}, key)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_weights(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """name -> (offset in the file, length); each tensor starts at a multiple of 64 bytes."""
    header, data = {}, b""
    for name, value in tensors.items():
        data += b"\0" * (-len(data) % 64)
        span = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": span}
        data += value.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return {
        n: (8 + len(text) + h["data_offsets"][0], h["data_offsets"][1] - h["data_offsets"][0])
        for n, h in header.items()
    }


def _prologue() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", ["net.k.weight.f32"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["encoder_hidden_states", "turned"], ["keys"]),
        helper.make_node("Transpose", ["net.v.weight.f32"], ["turned_v"], perm=[1, 0]),
        helper.make_node("MatMul", ["encoder_hidden_states", "turned_v"], ["values"]),
    ]


def _full() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Conv", ["sample", "net.conv.weight.f32"], ["a"]),
        node("ReduceMean", ["keys", "axis1"], ["mean"], keepdims=0),
        node("Unsqueeze", ["mean", "axes23"], ["mean4"]),
        node("Add", ["a", "mean4"], ["sum"]),
        node("Div", ["timestep", "thousand"], ["t"]),
        node("Add", ["t", "one"], ["t1"]),
        node("Unsqueeze", ["t1", "axes123"], ["scale"]),
        node("Mul", ["sum", "scale"], ["scaled"]),
        node("Tanh", ["scaled"], ["hidden"]),
        node("Conv", ["hidden", "net.out.weight.f32"], ["convolved"]),
        node("ReduceMean", ["values", "axis1"], ["mean_v"], keepdims=0),
        node("Unsqueeze", ["mean_v", "axes23"], ["mean_v4"]),
        node("Add", ["convolved", "mean_v4"], ["out_sample"]),
    ]


def _model(inputs, outputs, nodes, names, places, constants) -> onnx.ModelProto:
    tensors = weights()
    casts = [helper.make_node("Cast", [n], [f"{n}.f32"], to=TensorProto.FLOAT) for n in names]
    external = [_external(n, tensors[n].shape, *places[n]) for n in names]
    small = [
        helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in constants.items()
    ] + [
        helper.make_tensor(n, TensorProto.FLOAT, [], [v])
        for n, v in {"one": 1.0, "thousand": 1000.0}.items()
        if constants
    ]
    graph = helper.make_graph(
        casts + nodes,
        "handmade",
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in inputs],
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in outputs],
        external + small,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _external(name: str, shape: tuple[int, ...], offset: int, length: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name, data_type=TensorProto.FLOAT16, dims=shape, data_location=TensorProto.EXTERNAL
    )
    place = {"location": "weights.safetensors", "offset": offset, "length": length}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
