"""What the activations of a graph are like on recorded inputs, and the 8-bit grid that fits them.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.openvino import library
from ..engine.ports import Array, Floats
from .graph.quantize import Grid
from .record import free_memory

KEPT = 8192  # values kept of each activation in each sample
OUTPUT_BYTES = 1 << 30  # of activations that are held at once: the graph runs once for each share
SHARES = np.geomspace(0.25, 1.0, 33)  # of the largest value, tried as the end of a grid


@dataclass(frozen=True)
class Seen:
    """low, high: the extremes; values: some, evenly drawn over samples and positions."""

    low: float
    high: float
    values: Floats


def observe(
    graph: Path,
    names: Iterable[str],
    samples: Sequence[Mapping[str, Array]],
    precision: str,
    report: Callable[[float], None],
) -> dict[str, Seen]:
    """Run the graph on every sample; returns what the activations of these names were.

    samples     feeds of the graph; each may have its own shape
    precision   OpenVINO's INFERENCE_PRECISION_HINT
    report      called with the share that is done
    """
    ov = library()
    core = ov.Core()
    names = list(dict.fromkeys(names))
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    kept: dict[str, list[Floats]] = {n: [] for n in names}

    def keep(name: str, value: Floats) -> None:
        lows[name] = min(lows.get(name, np.inf), float(value.min()))
        highs[name] = max(highs.get(name, -np.inf), float(value.max()))
        flat = value.reshape(-1)
        # A stride that shares no factor with the shape visits every channel and position.
        stride = max(1, flat.size // KEPT) | 1
        kept[name].append(flat[::stride][:KEPT].astype(np.float32))

    shapes = _by_shape(samples)
    done, runs = 0, 0
    for group in shapes:
        shares = _shares(core, graph, names, group[0])
        runs = len(samples) * len(shares)
        for share in shares:
            model = core.read_model(graph)
            inputs = {n: p for p in model.inputs for n in p.names}
            wanted = [n for n in share if n not in inputs]
            ports = model.add_outputs(wanted)
            del ports
            model.reshape({n: list(v.shape) for n, v in group[0].items()})
            config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
            compiled = core.compile_model(model, "CPU", config)
            del model
            request = compiled.create_infer_request()
            for sample in group:
                request.infer(dict(sample))
                for name in share:
                    keep(name, sample[name] if name in inputs else _result(request, name))
                done += 1
                report(done / max(runs, 1))
            del request, compiled
            free_memory()
    return {n: Seen(lows[n], highs[n], np.concatenate(kept[n])) for n in names}


def grid(seen: Seen, *, symmetric: bool) -> Grid:
    """The grid of least squared error on the values that were seen.

    symmetric   int8 about zero; else uint8 with zero among its values
    """
    x = np.append(seen.values, [seen.low, seen.high]).astype(np.float64)
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    largest = max(-low, high)
    if largest == 0:
        return Grid(1.0, None if symmetric else 0)
    best: tuple[float, Grid] | None = None
    for share in SHARES:
        if symmetric:
            found = Grid(float(np.float32(share * largest / 127)))
            ends, zero = (-127, 127), 0
        else:
            scale = float(np.float32(max(share * (high - low), 1e-30) / 255))
            zero = int(np.clip(np.rint(-share * low / scale), 0, 255))
            found = Grid(scale, zero)
            ends = (-zero, 255 - zero)
        error = x - np.clip(np.rint(x / found.scale), *ends) * found.scale
        mean = float(np.mean(error**2))
        if best is None or mean < best[0]:
            best = mean, found
    assert best is not None, "there are shares to try"
    return best[1]


def _by_shape(samples: Sequence[Mapping[str, Array]]) -> list[list[Mapping[str, Array]]]:
    groups: dict[Any, list[Mapping[str, Array]]] = {}
    for sample in samples:
        groups.setdefault(tuple((n, v.shape) for n, v in sample.items()), []).append(sample)
    return list(groups.values())


def _shares(
    core: Any, graph: Path, names: Sequence[str], sample: Mapping[str, Array]
) -> list[list[str]]:
    """The names, in lots whose activations fit into OUTPUT_BYTES together."""
    model = core.read_model(graph)
    inputs = {n for p in model.inputs for n in p.names}
    model.add_outputs([n for n in names if n not in inputs])
    model.reshape({n: list(v.shape) for n, v in sample.items()})
    sizes = {n: 4 * int(np.prod(p.shape)) for p in model.outputs for n in p.names}
    lots: list[list[str]] = [[]]
    held = 0
    for name in names:
        held += sizes.get(name, 0)
        if held > OUTPUT_BYTES and lots[-1]:
            lots.append([])
            held = sizes.get(name, 0)
        lots[-1].append(name)
    return lots


def _result(request: Any, name: str) -> Floats:
    value: Floats = request.get_tensor(name).data
    return value
