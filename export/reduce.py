"""A failure made small: the one node where two ways part, as a graph of its own with its inputs.

    FOLDER/node.onnx     the node with the constants that it takes; float32 in and out, with casts
    FOLDER/inputs.npz    what it was fed with in the second way
    FOLDER/wanted.npz    what the first way has in its place

The folder is for the engine at fault: `polygraphy run node.onnx --trt --onnxrt`, a bug report.

checked by  tests/parity/test_compare.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from ..engine.bundle import Bundle
from ..engine.ports import Array
from .compare import Way, computed
from .graph.typed import F32, FLOATS

HALVES = tuple(t for t in FLOATS if t != F32)


def reduce(
    bundle: Bundle, name: str, ways: tuple[Way, Way], value: str, folder: Path,
    given: Mapping[str, Array] | None = None,
) -> Path:  # fmt: skip
    """Write the node of the second way's graph that gives `value`; returns `folder`.

    name, given     as of `compare`
    raises          as `compare`
    """
    first, second = ways
    model = ir.load(computed(bundle, name, second, [], given)[0].path)
    node = next(n for n in model.graph for v in n.outputs if v.name == value)
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Value] = {}
    fed: dict[str, ir.Value] = {}
    for v in node.inputs:
        if v is not None:
            _gather(v, nodes, constants, fed)
    inputs = computed(bundle, name, second, list(fed), given)[1]
    wanted = computed(bundle, name, first, [value], given)[1]
    folder.mkdir(parents=True, exist_ok=True)
    made = [ir.to_proto(n) for n in (*nodes, node)]
    casts, tensors = [], []
    for key, v in fed.items():
        outer = f"{key}/f32" if v.dtype in HALVES else key
        if v.dtype in HALVES:
            casts.append(helper.make_node("Cast", [outer], [key], to=int(v.dtype or F32)))
        kind = onnx.TensorProto.FLOAT if v.dtype in FLOATS or v.dtype is None else int(v.dtype)
        tensors.append(helper.make_tensor_value_info(outer, kind, inputs[key].shape))
        inputs[outer] = inputs.pop(key)
    result = f"{value}/f32"
    made.append(helper.make_node("Cast", [value], [result], to=onnx.TensorProto.FLOAT))
    graph = helper.make_graph(
        [*casts, *made], "node", tensors,
        [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)],
        [_constant(v) for v in constants.values()],
    )  # fmt: skip
    opsets = [helper.make_opsetid(d, n) for d, n in model.opset_imports.items()]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "node.onnx")
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "wanted.npz", **{result: wanted[value]})
    return folder


def _gather(
    value: ir.Value, nodes: list[ir.Node], constants: dict[str, ir.Value], fed: dict[str, ir.Value]
) -> None:
    """What hangs on constants alone goes along; anything else is fed."""
    producer = value.producer()
    if value.const_value is not None:
        constants[str(value.name)] = value
    elif producer is not None and _fixed(producer):
        for v in producer.inputs:
            if v is not None:
                _gather(v, nodes, constants, fed)
        if producer not in nodes:
            nodes.append(producer)
    else:
        fed[str(value.name)] = value


def _fixed(node: ir.Node) -> bool:
    inputs = [v for v in node.inputs if v is not None]
    return bool(inputs) and all(
        v.const_value is not None or ((p := v.producer()) is not None and _fixed(p)) for v in inputs
    )


def _constant(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None, "a constant holds a tensor"
    held = value.const_value
    if held.dtype in (F32, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.INT8):
        return numpy_helper.from_array(np.array(held.numpy()), value.name)
    raw = held.tobytes()
    return helper.make_tensor(str(value.name), int(held.dtype), held.shape.numpy(), raw, raw=True)
