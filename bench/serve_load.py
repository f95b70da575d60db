"""Many clients on one server, on the loopback: what it answers, how fast, and what it holds.

    python -m sdengine.bench.serve_load --clients 500 --requests 10000 --queue 64

A client asks for one picture at a time; when it is refused (429) it comes again after the time that
it was told, or after --patience where that is less. In the same run, before and after: the pipeline
alone, in a process of its own. One line of JSON is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .serve_client import Answer, Client, Server, metric, percentile, ready

STAGES, TOTAL = "sdengine_stage_seconds_sum", '{stage="total"}'
FIRST = 1000  # requests after which memory must stay as it is
ALONE = """
import sys, time
from sdengine import load
model, backend, threads, steps, seconds = sys.argv[1:]
with load(model, backend=backend, threads=int(threads)) as pipe:
    pipe(prompt="warm-up", steps=int(steps), seed=0, sampler="euler")
    begun, made = time.perf_counter(), 0
    while time.perf_counter() - begun < float(seconds):
        pipe(prompt="a red heart", steps=int(steps), seed=made, sampler="euler", guidance=7.0)
        made += 1
    print(made / (time.perf_counter() - begun))
"""
PROBE = """
import http.client, sys, time
host, port, gap = sys.argv[1], int(sys.argv[2]), 0.1
link = http.client.HTTPConnection(host, port)
while True:
    begun = time.perf_counter()
    link.request("GET", "/health/live"); link.getresponse().read()
    print(time.perf_counter() - begun, flush=True)
    time.sleep(gap)
"""


@dataclass
class Seen:
    codes: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    seeds: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, dict[str, int]]] = field(default_factory=list)


def body(k: int, steps: int) -> dict[str, Any]:
    return {"prompt": "a red heart", "seed": k, "steps": steps, "sampler_name": "Euler"}


async def one_client(url: str, numbers: Any, how: argparse.Namespace, seen: Seen) -> None:
    client = Client(url)
    while (k := next(numbers)) < how.requests:
        begun = time.perf_counter()
        try:
            answer = await client("POST", "/sdapi/v1/txt2img", body(k, how.steps))
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.wrong.append(f"request {k}: {error!r}")
            client.close()
            continue
        seen.codes[answer.status] += 1
        if answer.status == 200:
            seen.waits.append(time.perf_counter() - begun)
            seen.seeds[_seed(answer)] += 1
            if _seed(answer) != k:
                seen.wrong.append(f"request {k} got the picture of {_seed(answer)}")
        elif answer.status == 429:
            told = min(float(answer.headers["retry-after"]), how.patience)
            await asyncio.sleep(told * (0.5 + k % 50 / 100))  # not all at the same moment
        else:
            seen.wrong.append(f"request {k}: {answer.status} {answer.body[:200]!r}")
    client.close()


def _seed(answer: Answer) -> int:
    return int(json.loads(answer.json()["info"])["seed"])


async def watch(server: Server, seen: Seen) -> None:
    while True:
        seen.memory.append((seen.codes.total(), server.memory()))
        await asyncio.sleep(1.0)


def alone(arguments: argparse.Namespace) -> float:
    """Pictures a second of the pipeline in a process of its own."""
    command = [sys.executable, "-c", ALONE, arguments.model, arguments.backend, "1",
               str(arguments.steps), str(arguments.seconds)]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


async def overhead(server: Server, client: Client, steps: int, runs: int) -> dict[str, float]:
    """Milliseconds that one picture alone takes beyond the pipeline's own, from its own clock; and
    of the server's processor time, which other programs on the machine do not change."""
    seconds, before = [], await metric(client, STAGES, TOTAL)
    used = server.processor_s()
    for k in range(runs):
        begun = time.perf_counter()
        answer = await client("POST", "/sdapi/v1/txt2img", body(k, steps))
        assert answer.status == 200, answer.body
        seconds.append(time.perf_counter() - begun)
    inside = (await metric(client, STAGES, TOTAL) - before) / runs
    mean = sum(seconds) / runs
    used = (server.processor_s() - used) / runs
    return {"request_ms": 1e3 * mean, "pipeline_ms": 1e3 * inside,
            "overhead_ms": 1e3 * (mean - inside), "processor_ms": 1e3 * used}  # fmt: skip


async def load(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    client = Client(server.url)
    await ready(client)
    single = await overhead(server, client, arguments.steps, 40)
    seen, numbers = Seen(), count()
    host, port = server.url.removeprefix("http://").split(":")
    probe = subprocess.Popen([sys.executable, "-c", PROBE, host, port], stdout=subprocess.PIPE,
                             text=True)  # fmt: skip
    inside = await metric(client, STAGES, TOTAL)
    watching = asyncio.create_task(watch(server, seen))
    begun = time.perf_counter()
    await asyncio.gather(*(
        one_client(server.url, numbers, arguments, seen)
        for _ in range(arguments.clients)
    ))  # fmt: skip
    took = time.perf_counter() - begun
    inside = await metric(client, STAGES, TOTAL) - inside
    watching.cancel()
    probe.kill()
    assert probe.stdout is not None
    health = [float(line) for line in probe.stdout.read().split()]
    picture_s = took / max(seen.codes[200], 1)
    after = [held for done, held in seen.memory if done >= FIRST]
    growth = {name: after[-1][name] / after[0][name] - 1 for name in (after[0] if after else {})}
    return {
        "seconds": took,
        "answers": dict(seen.codes),
        "lost": arguments.requests - seen.codes.total(),
        "twice": sum(n - 1 for n in seen.seeds.values()),
        "wrong": seen.wrong[:5],
        "pictures_per_s": seen.codes[200] / took,
        "share_inside_pipeline": inside / took,
        "longest_wait_s": max(seen.waits),
        "starved_beyond_s": 2 * arguments.queue * picture_s,
        "health_ms": {"p50": 1e3 * percentile(health, 0.5), "p99": 1e3 * percentile(health, 0.99),
                      "max": 1e3 * max(health), "probes": len(health)},
        "memory_mib": {n: v / 2**20 for n, v in after[-1].items()} if after else {},
        "memory_growth": growth,
        "single": single,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", default=None)
    parser.add_argument("--patience", type=float, default=4.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the pipeline alone, twice")
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--backend", arguments.backend, "--threads", "1",
               "--queue", str(arguments.queue)]  # fmt: skip
    options += [] if arguments.batch is None else ["--batch", arguments.batch]
    rates = [alone(arguments)]
    with Server(options) as server:
        found = asyncio.run(load(server, arguments))
    rates.append(alone(arguments))
    rate = sum(rates) / len(rates)
    found |= {"alone_per_s": rates, "of_the_pipeline": found["pictures_per_s"] / rate}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
