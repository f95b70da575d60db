"""A torch module to an ONNX model: one function, no branch per network.

No weight is in memory while this runs: the module lives on torch's meta device, and each weight
becomes an input of the ONNX graph, under its LDM name, until `graph/weights.py` binds it to a file.

checked by  tests/parity/test_trace.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..engine.errors import TraceError
from ..engine.spec import ComponentSpec, TensorSpec
from .lowering import OPSET, WHOLE, Lowering, check_known, finish_names

IR_VERSION = 10  # the first one that has opset 21
DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT),
    "int64": (torch.int64, ir.DataType.INT64),
}


def trace(
    module: nn.Module, spec: ComponentSpec, *, prefix: str, multiples: Mapping[str, int]
) -> ir.Model:
    """The module's graph, inputs and outputs as `spec` has them, weights as further inputs.

    module      on the meta device, in evaluation mode; forward takes the inputs in spec's order
    prefix      put before each weight's name
    multiples   dimension -> what its size is always a multiple of; 1 when absent
    raises      TraceError when the module cannot be traced, or its results are not spec's
    """
    program = _program(module, spec, multiples)
    check_known(program.graph)
    _check(spec, program)
    lowering = Lowering()
    named = {t.name: t for t in spec.inputs}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    signature = program.graph_signature
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.inputs_to_parameters:
            name = prefix + signature.inputs_to_parameters[node.name].removeprefix(WHOLE)
            shape = tuple(node.meta["val"].shape)
            weights.append(value_of(TensorSpec(name, "float32", shape)))
            lowering.env[node] = weights[-1]
        elif node.op == "placeholder" and node.name in signature.inputs_to_buffers:
            path = signature.inputs_to_buffers[node.name]
            lowering.env[node] = lowering.constant(_table(module, path), path)
        elif node.op == "placeholder" and node.name in named:
            inputs.append(value_of(named[node.name]))
            lowering.env[node] = inputs[-1]
        elif node.op == "call_function":
            lowering.run(node)
    finish_names(lowering.nodes)
    outputs = [lowering.env[n] for n in _results(program)]
    for value, tensor in zip(outputs, spec.outputs, strict=True):
        value.name = tensor.name
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(DTYPES[tensor.dtype][1])
    graph = ir.Graph(
        inputs + [w for w in weights if w.uses()],  # a band holds its whole network
        outputs,
        nodes=lowering.nodes,
        initializers=list(lowering.constants.values()),
        opset_imports={"": OPSET},
        name=spec.name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="sdengine")


def value_of(tensor: TensorSpec) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(DTYPES[tensor.dtype][1]),
    )


def _program(
    module: nn.Module, spec: ComponentSpec, multiples: Mapping[str, int]
) -> ExportedProgram:
    # Different sizes, none of them 1, so that no dimension is taken for another or for a constant.
    sizes = {name: multiples.get(name, 1) * (2 + i) for i, name in enumerate(spec.dims)}
    dims = {name: multiples.get(name, 1) * Dim(f"{name}_", min=1) for name in spec.dims}
    feeds = tuple(
        torch.empty(t.resolve(sizes), dtype=DTYPES[t.dtype][0], device="meta") for t in spec.inputs
    )
    dynamic = tuple(
        {axis: dims[d] for axis, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs
    )
    try:
        with torch.no_grad():
            return torch.export.export(module, feeds, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch raises many kinds; all of them mean the same to the caller
        raise TraceError(
            f"{spec.name}: torch cannot trace {type(module).__name__}: {str(error)[:500]}",
            hint="the module must not branch on values or sizes; see export/modules/ops.py",
        ) from error


def _table(module: nn.Module, path: str) -> Any:
    """The content of a computed constant, which the meta device does not hold."""
    table = module.get_submodule(path.rpartition(".")[0])
    make: Any = table.make
    return make().numpy()


def _results(program: ExportedProgram) -> list[Any]:
    output = next(n for n in program.graph.nodes if n.op == "output")
    return list(output.args[0])


def _check(spec: ComponentSpec, program: ExportedProgram) -> None:
    """Names, number, dtypes, ranks and fixed sizes; raises TraceError."""
    found = list(program.graph_signature.user_inputs)
    expected = [t.name for t in spec.inputs]
    results = [n.meta["val"] for n in _results(program)]
    problems = [] if found == expected else [f"inputs {found}, expected {expected}"]
    if len(results) != len(spec.outputs):
        problems.append(f"{len(results)} results, expected {len(spec.outputs)}")
    for tensor, result in zip(spec.outputs, results, strict=False):
        shape = [d if isinstance(d, int) else "?" for d in result.shape]
        wanted = [d if isinstance(d, int) else "?" for d in tensor.shape]
        if shape != wanted or result.dtype != DTYPES[tensor.dtype][0]:
            problems.append(f"{tensor.name} is {result.dtype} {shape}, expected {tensor}")
    if problems:
        raise TraceError(
            f"{spec.name}: the traced module is not what its spec says: {'; '.join(problems)}",
            hint="make export/components.py and the module agree",
        )
