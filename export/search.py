"""Which layers to leave in float: each one's share of the noise, measured on recorded steps.

The noise of one layer's rounding, alone, in what the sampler uses: the guided guess at the picture,
x0. Measured on the embedded model these add up (their sum and the noise of all at once differ by
0.02 dB), so that one pass over the layers tells what any choice of them costs.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import onnx_ir as ir

from ..backends.openvino import library
from ..engine.ports import Array, Floats
from ..engine.weights import read_header
from .graph.gates import GATES, gated
from .graph.quantize import Divisors, Grids, Layer
from .graph.tools import save

log = logging.getLogger("sdengine.export")

SAMPLES = 5  # recorded steps, spread over the noise levels
GATED = "gated.onnx"

Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Noise:
    """What was measured.

    layers      name -> mean squared error of the output when that layer alone is int8; those
                that were not reached in time are absent
    whole       of all layers at once
    """

    layers: Mapping[str, float]
    whole: float


def measure(
    graph: Path,
    twin_weights: Path,
    order: Sequence[Layer],
    grids: Grids,
    divisors: Divisors,
    samples: Sequence[Feeds],
    weight_of: Callable[[Feeds], float],
    seconds: float,
    report: Callable[[float], None],
) -> Noise:
    """Turn every layer's rounding on alone, the last layers first.

    graph         in float
    twin_weights  the int8 weights of all its layers, in a folder below the graph's
    weight_of     what a squared error of this sample's output counts
    seconds       when to stop
    """
    location = twin_weights.relative_to(graph.parent).as_posix()
    model = gated(
        ir.load(graph),
        grids,
        read_header(twin_weights),
        location=location,
        order=order,
        divisors=divisors,
    )
    path = graph.parent / GATED
    save(model, path)
    try:
        run = _compiled(path, samples[0], 2 * len(order))
    finally:
        path.unlink()
    gates = np.zeros(2 * len(order), np.float32)
    reference = [run(sample, gates) for sample in samples]

    def noise() -> float:
        errors = [
            weight_of(s) * float(np.mean((run(s, gates) - r) ** 2))
            for s, r in zip(samples, reference, strict=True)
        ]
        return float(np.mean(errors))

    gates[:] = 1
    whole = noise()
    found: dict[str, float] = {}
    end = monotonic() + seconds
    for done, i in enumerate(reversed(range(len(order)))):
        if monotonic() > end:
            log.info("search: the time is up, %d of %d layers measured", done, len(order))
            break
        gates[:] = 0
        gates[2 * i : 2 * i + 2] = 1
        found[order[i].name] = noise()
        report((done + 1) / len(order))
    return Noise(found, whole)


def worst(noise: Noise, macs: Mapping[str, int], share: float) -> list[str]:
    """Layers to leave in float, noisiest for their cost first, until `share` of all
    multiply-adds is in float.

    macs        of each layer
    """
    room = share * sum(macs.values())
    chosen = []
    for name in sorted(noise.layers, key=lambda n: -noise.layers[n] / max(macs[n], 1)):
        if macs[name] <= room:
            chosen.append(name)
            room -= macs[name]
    return chosen


def _compiled(path: Path, sample: Feeds, gates: int) -> Callable[[Feeds, Floats], Floats]:
    core: Any = library().Core()
    model = core.read_model(path)
    model.reshape({GATES: [gates], **{n: list(v.shape) for n, v in sample.items()}})
    request = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()

    def run(feeds: Feeds, values: Floats) -> Floats:
        request.infer({**feeds, GATES: values})
        result: Floats = request.get_output_tensor(0).data.copy()
        return result

    return run
