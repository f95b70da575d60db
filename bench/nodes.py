"""Where a step's time goes: the executed graph of a UNet, node by node, summed by what they are.

    python -m sdengine.bench.nodes BUNDLE --precision int8 --size 512x512

OpenVINO times each node of the graph that it executes (its own counters, one call at a time). Nodes
are summed by their kind and by the precision that they ran in; beside it stands the rate of a
matrix product in the same run, before and after, and the share of it that the whole call reaches.

checked by  tests/unit/test_bench_nodes.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from .. import api
from ..backends import machine
from ..backends.cache import Store
from ..backends.openvino import OpenVINO, library
from ..engine.bundle import open_bundle
from ..engine.ports import Array
from ..engine.spec import Graph, Precision, Profile
from . import ceiling, env, limits

CALLS = 3
# OpenVINO's layer types -> what the table calls them; what is not here stands under "rest"
KINDS: Mapping[str, str] = {
    "Convolution": "convolutions",
    "FullyConnected": "linear layers",
    "FullyConnectedQuantizedLegacy": "linear layers",
    "FullyConnectedCompressed": "linear layers",
    "MatMul": "products of activations",
    "ScaledDotProductAttention": "attention",
    "Softmax": "softmax",
    "MVN": "norms",
    "GroupNormalization": "norms",
    "FakeQuantize": "rounding to 8 bits",
    "Eltwise": "elementwise",
    "Subgraph": "elementwise",
    "Math": "elementwise",
    "Interpolate": "upsampling",
    "Reorder": "reorders",
    "Transpose": "transposes",
    "Reshape": "reshapes, splits, joins",
    "Split": "reshapes, splits, joins",
    "StridedSlice": "reshapes, splits, joins",
    "Concatenation": "reshapes, splits, joins",
}


@dataclass(frozen=True)
class Node:
    """One node of an executed graph. precision: OpenVINO's name; seconds: of one call."""

    name: str
    layer: str
    precision: str
    seconds: float


@dataclass(frozen=True)
class Sum:
    """All nodes of one kind and precision. share: of the time of all nodes."""

    kind: str
    precision: str
    nodes: int
    seconds: float
    share: float


def sums(nodes: Iterable[Node]) -> list[Sum]:
    """By kind and precision, the longest first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for node in nodes:
        key = kind(node), node.precision
        groups.setdefault(key, []).append(node.seconds)
    whole = sum(map(sum, groups.values()))
    found = [
        Sum(kind, precision, len(times), sum(times), sum(times) / whole if whole else 0.0)
        for (kind, precision), times in groups.items()
    ]
    return sorted(found, key=lambda s: -s.seconds)


def kind(node: Node) -> str:
    """What the table calls it. A subgraph that ends in an attention's product is that attention."""
    if node.layer == "Subgraph" and ".attn" in node.name and "/MatMul" in node.name:
        return "attention"
    return KINDS.get(node.layer, "rest")


def markdown(found: Sequence[Sum]) -> str:
    lines = ["| nodes | in | number | ms | of all |", "|---|---|---|---|---|"]
    lines += [
        f"| {s.kind} | {s.precision} | {s.nodes} | {1e3 * s.seconds:.0f} | {100 * s.share:.1f} % |"
        for s in found
        if s.share >= 0.001
    ]
    return "\n".join(lines)


def timed(run: Callable[[], Iterable[Node]], calls: int) -> tuple[list[Node], float]:
    """Each node's median over the calls after a first one, and the median of a whole call.

    Nodes that take no time (constants, what the engine does in place) are left out.
    """
    run()
    seconds, seen = [], []
    for _ in range(calls):
        start = perf_counter()
        nodes = run()
        seconds.append(perf_counter() - start)
        seen.append(list(nodes))
    middle = [
        Node(same[0].name, same[0].layer, same[0].precision, median(n.seconds for n in same))
        for same in zip(*seen, strict=True)
    ]
    return [node for node in middle if node.seconds > 0], median(seconds)


class _Counted(OpenVINO):
    """The backend as it is, with OpenVINO's counters on."""

    @cached_property
    def _core(self) -> Any:
        core = library().Core()
        core.set_property("CPU", {"PERF_COUNT": True})
        return core


def executed(request: Any) -> list[Node]:
    """The nodes of a request that was compiled with PERF_COUNT, after a call of it."""
    return [
        Node(
            info.node_name,
            info.node_type,
            info.exec_type.rpartition("_")[2],
            info.real_time.total_seconds(),
        )
        for info in request.profiling_info
    ]


def feeds_of(graph: Graph, dims: Mapping[str, int], paired: bool = False) -> dict[str, Array]:
    """Noise of deviation 1 for every input: time does not depend on what is computed.

    paired      rows are twice the same, as those of a guided step (Profile.paired)
    """
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in graph.inputs:
        noise = rng.standard_normal(spec.resolve(dims)).astype(np.float32)
        if paired:
            noise[len(noise) // 2 :] = noise[: len(noise) // 2]
        feeds[spec.name] = noise
    return feeds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--precision", default="int8", choices=("f32", "bf16", "int8"))
    parser.add_argument("--size", default="512x512", help="HEIGHTxWIDTH of the picture")
    parser.add_argument("--batch", type=int, default=2, help="even: the rows of a guided step")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON, every node in it")
    args = parser.parse_args(arguments)
    bundle = open_bundle(api.find_model(args.model))
    precision: Precision = args.precision
    height, width = (int(side) // bundle.facts.latent.factor for side in args.size.split("x"))
    dims = {"B": args.batch, "T": bundle.facts.tokenizer.length, "h": height, "w": width}
    threads = machine.plan().threads if args.threads is None else args.threads
    whole = bundle.component("unet")
    component = whole.at(precision)
    graph = component.graphs["full"]
    paired = args.batch % 2 == 0
    profile = Profile(dims, precision, threads, paired=paired)
    compiled = _Counted(Store(limit=0)).compile(component, graph, profile)
    request = compiled._compiled.create_infer_request()
    feeds = feeds_of(graph, dims, paired)

    def run() -> list[Node]:
        request.infer(feeds)
        return executed(request)

    rates = [ceiling.measure(precision, threads)]
    nodes, call = timed(run, args.calls)
    rates.append(ceiling.measure(precision, threads))
    best = max(rate.flops for rate in rates)
    # as the network was traced: what rewriting spares counts as done
    flop = limits.count(str(whole.graphs["full"].path), tuple(sorted(dims.items())))
    found = sums(nodes)
    sys.stdout.write(
        f"{markdown(found)}\n\ncall {call:.3f} s, {sum(s.seconds for s in found):.3f} s in nodes;"
        f" {flop / call / 1e9:.0f} GFLOP/s of {best / 1e9:.0f} = {flop / call / best:.1%}\n"
    )
    if args.out is not None:
        content = {
            "model": bundle.id,
            "precision": precision,
            "dims": dims,
            "paired": paired,
            "call_s": call,
            "flop": flop,
            "rates": [rate.to_dict() for rate in rates],
            "sums": [asdict(s) for s in found],
            "nodes": [asdict(n) for n in nodes],
            "conditions": env.conditions(),
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
