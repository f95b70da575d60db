"""Two replicas of the server on Ray Serve, on this machine, answering as one.

`ray_server.py BUNDLE`; prints one JSON object.
"""

from __future__ import annotations

import collections
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "240")

import httpx
import ray
from ray import serve

from sdengine.serve import ray_serve
from sdengine.serve.config import Config, Engine

ASK = {"prompt": "a red fox", "steps": 1, "width": 128, "height": 64}


def counted(client: httpx.Client, requests: int) -> dict[str, int]:
    def one(_: int) -> str:
        return str(client.post("/sdapi/v1/txt2img", json=ASK).status_code)

    with ThreadPoolExecutor(4) as pool:
        return dict(collections.Counter(pool.map(one, range(requests))))


def settled(client: httpx.Client) -> None:
    """Until ten answers in a row say that a model is open: both replicas are asked by chance."""
    good, deadline = 0, time.monotonic() + 200
    while good < 10 and time.monotonic() < deadline:
        ready = client.get("/health/ready").status_code == 200
        good = good + 1 if ready else 0
        time.sleep(0.05 if ready else 1.0)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Config(
        models={"tiny": Path(sys.argv[1])}, port=port, batch=1, engine=Engine(backend="fake")
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": config.host, "port": port})
    application = ray_serve.deployment(config, {"num_cpus": 1.0, "num_gpus": 0.0}, 2, least=2)
    serve.run(application, name=ray_serve.NAME, route_prefix="/")
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    settled(client)
    facts: dict[str, object] = {"answered": counted(client, 12)}
    states = serve.status().applications[ray_serve.NAME].deployments[ray_serve.NAME].replica_states
    facts["replicas"] = states
    facts["jobs"] = client.post("/jobs", json={"prompt": "x"}).status_code
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    serve.shutdown()
    ray.shutdown()


main()
