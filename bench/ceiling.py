"""The machine's rate of matrix products: what a network's speed is held against.

One square product through OpenVINO, with the threads and the precision of the row that it is for,
in a process of its own and in the same run. Square and large, it is the best case: convolutions and
small products reach less. The best of several calls counts, since noise only ever slows down.

checked by  tests/unit/test_bench_ceiling.py (the graph computes a product; the precision it ran in)
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ..engine.errors import BackendUnavailable, UnknownName

SIDE = 2048  # 17 GFLOP a call: a tenth of a second on a small machine, and far above any cache
CALLS = 5
PRECISIONS = ("f32", "bf16", "f16", "int8")


@dataclass(frozen=True)
class Rate:
    """flops       operations a second, best of `calls` calls; an int8 operation counts as one too
    ran_in      the precision that OpenVINO says it computed in ("i8", "bf16", "f32")
    side        of the three matrix dimensions
    """

    precision: str
    threads: int
    flops: float
    ran_in: str
    side: int
    calls: int
    engine: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(precision: str, threads: int, *, side: int = SIDE, calls: int = CALLS) -> Rate:
    """Raises UnknownName, BackendUnavailable (no openvino, or not this precision here)."""
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    request, ran_in, version = product(precision, threads, side)
    if ran_in != RUNS_AS[precision]:
        raise BackendUnavailable(
            f"a product asked for in {precision} ran in {ran_in} on this processor",
            hint=f"its rate is not that of {precision}; `sdengine doctor` lists what can run",
        )
    request.infer()
    seconds = []
    for _ in range(calls):
        start = perf_counter()
        request.infer()
        seconds.append(perf_counter() - start)
    rate = 2 * side**3 / min(seconds)
    return Rate(precision, threads, rate, ran_in, side, calls, f"OpenVINO {version}")


RUNS_AS = {"f32": "f32", "bf16": "bf16", "f16": "f16", "int8": "i8"}


def product(precision: str, threads: int, side: int) -> tuple[Any, str, str]:
    """A request that multiplies its input [side, side] by a constant, what the product's node runs
    in, and OpenVINO's version. int8: both factors are quantised, as a quantised network's are."""
    try:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino
        from openvino import opset13 as ops
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the machine's rate is measured with the package {error.name}",
            hint="pip install 'openvino>=2026.2', or run without the distance from the limit",
        ) from error
    weights = np.random.default_rng(0).uniform(-1, 1, (side, side)).astype(np.float32)
    given = ops.parameter([side, side], np.float32, name="x")
    factors: list[Any] = [given, ops.constant(weights)]
    if precision == "int8":
        # 256 levels for activations, 255 symmetric ones for weights: what NNCF writes
        low, high = np.float32(-1.0), np.float32(127 / 128)
        factors[0] = ops.fake_quantize(given, low, high, low, high, 256)
        edge = np.float32(1.0)
        factors[1] = ops.fake_quantize(factors[1], -edge, edge, -edge, edge, 255)
    result = ops.matmul(factors[0], factors[1], False, True)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "int8" else precision,
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    if precision == "int8" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        config["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(openvino.Model([result], [given]), "CPU", config)
    request = compiled.create_infer_request()
    request.input_tensors[0].data[:] = np.random.default_rng(1).uniform(-1, 1, (side, side))
    version = str(openvino.get_version()).partition("-")[0]
    return request, _runs_in(compiled), version


def _runs_in(compiled: Any) -> str:
    """The precision of the product's node in the graph that is executed."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            return str(info["runtimePrecision"].astype(str))
    return "unknown"
