"""Two ways to compute one graph, value by value: where do they part?

A way is `backend:precision`: onnxruntime:f32, openvino:bf16, openvino:int8, trt:f16 (the typed
graph, with the roundings of a GPU). Values keep their names from the portable graph to its typed
and its quantised twin, so the same one is looked at in both. The first in order of use that is too
far from its counterpart names the node that parts, for all before it agree.

checked by  tests/parity/test_compare.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..backends import openvino
from ..backends.plans import typed
from ..engine.bundle import Bundle
from ..engine.errors import MissingPart, RequestError, UnknownName
from ..engine.ports import Array, Floats
from ..engine.spec import Component, Graph, Precision
from .graph.emulate import emulated
from .targets.tensorrt import ERRORS_ONLY, FOLDER, library

LOT = 256  # values that are held of one run: the graph runs once for each lot
WORST = 12  # values that are shown
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Line:
    """How far one value is in the second way from what it is in the first.

    psnr_db     infinite when equal; minus infinity when one has NaN or infinity
    """

    value: str
    op: str
    max_abs: float
    psnr_db: float


@dataclass(frozen=True)
class Way:
    backend: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"


WAYS: Mapping[str, tuple[Precision, ...]] = {
    "onnxruntime": ("f32", "int8"),
    "openvino": ("f32", "bf16", "int8"),
    "trt": ("f16", "bf16", "int8", "fp8"),
}


def read_way(text: str) -> Way:
    """`trt:f16`. Raises UnknownName."""
    known = [f"{b}:{p}" for b, precisions in WAYS.items() for p in precisions]
    if text not in known:
        raise UnknownName("way to compute a graph", text, known)
    backend, _, precision = text.partition(":")
    return Way(backend, precision)  # type: ignore[arg-type]


def compare(
    bundle: Bundle, name: str, first: Way, second: Way, given: Feeds | None = None
) -> list[Line]:
    """Every value that both ways have, in order of use.

    name        `unet/full`, `vae_decoder`
    given       inputs of the component; None: normal numbers of a fixed seed, at native size
    raises      UnknownName, MissingPart, RequestError: an input that is not there
    """
    part, _, which = name.partition("/")
    if part not in bundle.components:
        raise UnknownName("component", part, bundle.components)
    component = bundle.components[part]
    which = which if which else "full"
    if which not in component.graphs:
        raise UnknownName(f"graph of {part}", which, component.graphs)
    feeds = _feeds(bundle, component, which, given)
    graphs = [_network(component, way).graphs[which] for way in (first, second)]
    order = _order(component.graphs[which])
    known = [_names(g) for g in graphs]
    wanted = [value for value in order if all(value in k for k in known)]
    lines: list[Line] = []
    for begin in range(0, len(wanted), LOT):
        lot = wanted[begin : begin + LOT]
        one, other = (
            _run(way, graph, lot, feeds) for way, graph in zip((first, second), graphs, strict=True)
        )
        lines += [_line(value, order[value], one[value], other[value]) for value in lot]
    return lines


def computed(
    bundle: Bundle, name: str, way: Way, values: Sequence[str], given: Feeds | None = None
) -> tuple[Graph, dict[str, Array]]:
    """The graph of one way, and these values of it; its own inputs may be asked for too.

    name, given, raises     as of `compare`
    """
    part, _, which = name.partition("/")
    component, which = bundle.component(part), which if which else "full"
    feeds = _feeds(bundle, component, which, given)
    graph = _network(component, way).graphs[which]
    inner = [v for v in values if v not in feeds]
    found = _run(way, graph, inner, feeds) if inner else {}
    return graph, {v: feeds[v] if v in feeds else found[v] for v in values}


def parts_at(lines: Sequence[Line], psnr_db: float) -> Line | None:
    """The first value that is further off than this; None: all agree."""
    return next((line for line in lines if line.psnr_db < psnr_db), None)


def read_feeds(path: Path) -> Feeds:
    """Inputs kept by a parity failure (`inputs.npz`), or by numpy.savez. Raises RequestError."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} holds no inputs: {error}",
            hint="give the inputs.npz of a parity failure's folder, or one written by numpy.savez",
        ) from error


def _network(component: Component, way: Way) -> Component:
    if way.backend == "trt":
        return typed(component, way.precision)
    if way.precision == "int8" and "int8" not in component.quantised:
        raise MissingPart(
            f"{component.spec.name} has no quantised network",
            hint="make it: sdengine export BUNDLE --precision int8",
        )
    return component.at(way.precision)


def _order(graph: Graph) -> dict[str, str]:
    """Float values of the portable graph -> what makes them, in order of use."""
    moved = ("Cast", "Shape", "Constant")
    return {
        str(v.name): node.op_type
        for node in ir.load(graph.path).graph
        if node.op_type not in moved
        for v in node.outputs
    }


def _names(graph: Graph) -> set[str]:
    return {str(v.name) for node in ir.load(graph.path).graph for v in node.outputs}


def _feeds(bundle: Bundle, component: Component, which: str, given: Feeds | None) -> Feeds:
    """All that the graph takes; the prologue's results are computed."""
    wanted = [t.name for t in component.graphs[which].inputs]
    known = dict(_drawn(bundle, component, which) if given is None else given)
    prologue = component.graphs.get("prologue")
    if prologue is not None and which != "prologue":
        if missing := [t.name for t in prologue.inputs if t.name not in known]:
            raise _lacks(missing)
        taken = {t.name: known[t.name] for t in prologue.inputs}
        results = [t.name for t in prologue.outputs]
        known |= _run_ort(ir.load(prologue.path), prologue.path, results, taken)
    if missing := [n for n in wanted if n not in known]:
        raise _lacks(missing)
    return {n: known[n] for n in wanted}


def _lacks(names: Sequence[str]) -> RequestError:
    return RequestError(
        f"the inputs lack {', '.join(names)}",
        hint="leave --inputs out for numbers of a fixed seed, or give all inputs of the component",
    )


def _drawn(bundle: Bundle, component: Component, which: str) -> Feeds:
    """Normal numbers at the model's own size; the middle of the schedule; low token ids."""
    facts = bundle.facts
    height, width = facts.native_size
    factor = facts.latent.factor
    dims = {"B": 1, "T": facts.tokenizer.length, "h": height // factor, "w": width // factor,
            "H": height, "W": width}  # fmt: skip
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    tensors = {t.name: t for t in (*component.spec.inputs, *component.graphs[which].inputs)}
    for t in tensors.values():
        shape = t.resolve(dims)
        if t.name == "timestep":
            feeds[t.name] = np.full(shape, facts.schedule.timesteps / 2, np.float32)
        elif t.dtype == "int64":
            feeds[t.name] = random.integers(0, 20, shape)
        else:
            feeds[t.name] = random.standard_normal(shape, np.float32)
    return feeds


def _run(way: Way, graph: Graph, values: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    if way.backend == "openvino":
        return _run_openvino(way, graph, values, feeds)
    model = ir.load(graph.path)
    return _run_ort(emulated(model) if way.backend == "trt" else model, graph.path, values, feeds)


def _run_ort(model: ir.Model, path: Path, values: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    """Values of the graph; `path` tells where its weights lie."""
    proto = ir.to_proto(model)
    have = {v.name for v in proto.graph.output}
    for name in values:
        if name not in have:
            proto.graph.output.add().name = name
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry(FOLDER, str(path.parent))
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(values, session.run(list(values), dict(feeds)), strict=True))


def _run_openvino(way: Way, graph: Graph, values: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    core: Any = openvino.library().Core()
    model = core.read_model(graph.path)
    own = {name for port in model.outputs for name in port.names}
    model.add_outputs([v for v in values if v not in own])
    model.reshape({n: list(v.shape) for n, v in feeds.items()})
    hint = "f32" if way.precision == "int8" else way.precision
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()
    request.infer(dict(feeds))
    return {v: request.get_tensor(v).data.copy() for v in values}


def _line(value: str, op: str, one: Floats, other: Floats) -> Line:
    """Where both have the same infinity (a masked score) they agree; a value that is one number
    throughout is measured by its size."""
    differs = one != other
    if not differs.any():
        return Line(value, op, 0.0, np.inf)
    finite = np.isfinite(one)
    if not (np.isfinite(other) | ~differs).all() or not (finite | ~differs).all():
        return Line(value, op, np.inf, -np.inf)
    known = one[finite].astype(np.float64)
    error = other[finite] - known
    peak = float(np.ptp(known)) if np.ptp(known) > 0 else float(np.abs(known).max())
    mean = float(np.mean(error**2))
    psnr = 20 * np.log10(max(peak, 1e-30)) - 10 * np.log10(mean)
    return Line(value, op, float(np.abs(error).max()), float(psnr))


def compared(
    bundle: Bundle,
    between: str,
    name: str,
    inputs: Path | None,
    least_db: float,
    small: Path | None = None,
) -> dict[str, Any]:
    """What the command line shows: the value that parts, the worst ones, all of them, plain JSON.

    between     two ways with a comma between: onnxruntime:f32,trt:f16
    small       folder for the node where they part (export/reduce.py)
    raises      RequestError, and as `compare`
    """
    ways = between.split(",")
    if len(ways) != 2:
        raise RequestError(
            f"--compare {between}: two ways to compute a graph, with a comma between",
            hint="for instance --compare onnxruntime:f32,trt:f16",
        )
    first, second = (read_way(way.strip()) for way in ways)
    given = None if inputs is None else read_feeds(inputs)
    lines = compare(bundle, name, first, second, given)
    found = parts_at(lines, least_db)
    if small is not None and found is not None:
        from .reduce import reduce

        reduce(bundle, name, (first, second), found.value, small, given)
    return {
        "graph": name,
        "between": [str(first), str(second)],
        "least_db": least_db,
        "parts_at": None if found is None else _plain(found),
        "worst": [_plain(line) for line in sorted(lines, key=lambda a: a.psnr_db)[:WORST]],
        "values": [_plain(line) for line in lines],
    }


def shown(found: Mapping[str, Any]) -> list[str]:
    """`compared`, as lines to read."""
    first, second = found["between"]
    count, least = len(found["values"]), found["least_db"]
    lines = [f"{found['graph']}: {second} against {first}, {count} values, least {least:g} dB"]
    at = found["parts_at"]
    if at is None:
        lines.append("they part nowhere")
    else:
        lines.append(f"they part at {at['value']} ({at['op']}): {_db(at)}")
    lines.append("furthest apart:")
    return lines + [f"  {_db(one):>10}  {one['op']:<22} {one['value']}" for one in found["worst"]]


def _plain(line: Line) -> dict[str, Any]:
    """psnr_db: null for equal values; finite: false where one has NaN or infinity"""
    known = np.isfinite(line.psnr_db)
    return {
        "value": line.value,
        "op": line.op,
        "max_abs": line.max_abs if np.isfinite(line.max_abs) else None,
        "psnr_db": round(line.psnr_db, 2) if known else None,
        "finite": bool(line.psnr_db != -np.inf),
    }


def _db(line: Mapping[str, Any]) -> str:
    if not line["finite"]:
        return "not finite"
    return "equal" if line["psnr_db"] is None else f"{line['psnr_db']:.1f} dB"
