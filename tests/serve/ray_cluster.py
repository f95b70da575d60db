"""A batch on a Ray cluster of two nodes on this machine, one of which is killed in the middle.

`ray_cluster.py BUNDLE LINES OUT BACKEND`; prints one JSON object. With `--ratio` at the
end nothing is killed: the same batch on one node and on two, timed after a batch that warms up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A node starts in seconds; beside other work on two cores, in a minute.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "240")

import ray
from ray.cluster_utils import Cluster as Machines

from sdengine.engine.bundle import open_bundle
from sdengine.serve import batch, lines, plan
from sdengine.serve.ray_batch import Cluster

STORE = 100 * 2**20  # bytes of a node's object store: what the pictures need, and Ray's least


def node(machines: Machines, cpus: int) -> Any:
    return machines.add_node(num_cpus=cpus, object_store_memory=STORE, include_dashboard=False)


def alive(at_most: int) -> int:
    """Nodes, once Ray has noticed that one is gone."""
    deadline = time.monotonic() + 60
    while True:
        found = sum(one["Alive"] for one in ray.nodes())
        if found <= at_most or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def main() -> None:
    bundle, requests, out = map(Path, sys.argv[1:4])
    backend = sys.argv[4]
    ratio = sys.argv[-1] == "--ratio"
    wanted = plan.items(lines.read(requests).good, open_bundle(bundle).id, {"backend": backend})
    engine = Cluster("auto", str(bundle), open_bundle(bundle).id, {"backend": backend})
    machines = Machines()
    node(machines, 0)  # the head: it decides, and makes no picture
    nodes = [node(machines, 1)]
    ray.init(machines.address, log_to_driver=False, logging_level="ERROR")

    facts: dict[str, Any] = {}
    if ratio:
        batch.run(wanted[:2], out / "warm", engine)
        facts["one"] = batch.run(wanted, out / "one", engine).seconds
    nodes.append(node(machines, 1))
    if ratio:
        batch.run(wanted[:4], out / "warm-two", engine)
        facts["two"] = batch.run(wanted, out / "two", engine).seconds
        facts["pictures"] = len(wanted)
    else:
        made: list[Path] = []

        def lose_a_node(path: Path) -> None:
            made.append(path)
            if len(made) == len(wanted) // 3:
                machines.remove_node(nodes[0], allow_graceful=False)

        begin = time.perf_counter()
        outcome = batch.run(wanted, out, engine, hooks=batch.Hooks(on_file=lose_a_node))
        facts = {"made": outcome.made, "failed": outcome.failed, "wanted": outcome.wanted}
        facts["seconds"] = time.perf_counter() - begin
        facts["nodes"] = alive(at_most=2)
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    ray.shutdown()
    machines.shutdown()


main()
