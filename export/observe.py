"""What the activations of a graph are like on recorded inputs, and the 8-bit grid that fits them.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.openvino import library
from ..engine.ports import Array, Floats
from .graph.quantize import INT8, Grid, Steps
from .record import free_memory

KEPT = 8192  # values kept of each activation in each sample
FEWEST = 16  # positions, however many channels there are
MOST = 1 << 16  # values that a grid is fitted to
OUTPUT_BYTES = 1 << 30  # of activations that are held at once: the graph runs once for each share
CUT: Sequence[float] = tuple(np.geomspace(0.25, 1.0, 21))  # a grid that ends within what was seen


@dataclass(frozen=True)
class Seen:
    """lows, highs: the extremes of each channel, [C]; values: [n, C], at some positions, evenly
    drawn over samples and positions."""

    lows: Floats
    highs: Floats
    values: Floats

    def divided(self, by: Floats) -> Seen:
        """Each channel divided by its own number: [C], positive."""
        return Seen(self.lows / by, self.highs / by, self.values / by)


def observe(
    graph: Path,
    names: Mapping[str, int],
    samples: Sequence[Mapping[str, Array]],
    precision: str,
    report: Callable[[float], None],
) -> dict[str, Seen]:
    """Run the graph on every sample; returns what the activations of these names were.

    names       activation -> its axis of channels
    samples     feeds of the graph; each may have its own shape
    precision   OpenVINO's INFERENCE_PRECISION_HINT
    report      called with the share that is done
    """
    ov = library()
    core = ov.Core()
    lows: dict[str, Floats] = {}
    highs: dict[str, Floats] = {}
    kept: dict[str, list[Floats]] = {n: [] for n in names}

    def keep(name: str, value: Floats) -> None:
        channels = value.shape[names[name]]
        rows = np.moveaxis(value, names[name], -1).reshape(-1, channels)
        low, high = rows.min(axis=0), rows.max(axis=0)
        lows[name] = np.minimum(lows[name], low) if name in lows else low
        highs[name] = np.maximum(highs[name], high) if name in highs else high
        count = min(len(rows), max(FEWEST, KEPT // channels))
        places = np.linspace(0, len(rows) - 1, count).round().astype(int)
        kept[name].append(rows[places].astype(np.float32))

    shapes = _by_shape(samples)
    done, runs = 0, 0
    for group in shapes:
        shares = _shares(core, graph, list(names), group[0])
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


def grid(
    seen: Seen,
    *,
    symmetric: bool,
    weights: Floats | None = None,
    shares: Sequence[float] = CUT,
    steps: Steps = INT8,
) -> Grid:
    """The grid of least squared error on the values that were seen.

    Steps of a floating point have their finest below the largest value, however large that is:
    nothing is gained by cutting it off.

    symmetric   about zero; else uint8 with zero among its values
    shares      of the largest value, tried as the end of a grid of int8
    weights     what a channel's squared error counts, [C]; None: all alike
    """
    x = np.vstack([seen.values[:: 1 + seen.values.size // MOST], seen.lows, seen.highs])
    counts = np.ones(x.shape[1]) if weights is None else weights
    low, high = min(float(seen.lows.min()), 0.0), max(float(seen.highs.max()), 0.0)
    largest = max(-low, high)
    if largest == 0:
        return Grid(1.0, None if symmetric else 0, steps)
    if steps is not INT8:
        return Grid(float(np.float32(largest / steps.largest)), None, steps)
    best: tuple[float, Grid] | None = None
    for share in shares:
        if symmetric:
            found = Grid(float(np.float32(share * largest / 127)))
        else:
            scale = float(np.float32(max(share * (high - low), 1e-30) / 255))
            found = Grid(scale, int(np.clip(np.rint(-share * low / scale), 0, 255)))
        error = float(np.mean(rounding_error(x, found) ** 2, axis=0) @ counts)
        if best is None or error < best[0]:
            best = error, found
    assert best is not None, "there are shares to try"
    return best[1]


def rounding_error(values: Floats, chosen: Grid) -> Floats:
    """What rounding to the grid changes, in the values' own shape."""
    scale = np.float32(chosen.scale)
    if chosen.zero is None:
        steps = chosen.steps.of(values / scale).astype(np.float32)
    else:
        steps = np.clip(np.rint(values / scale), -chosen.zero, 255 - chosen.zero)
    found: Floats = steps * scale - values
    return found


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
