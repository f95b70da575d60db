"""Many clients on one server, on the loopback: what it answers, how fast, and what it holds.

    python -m sdengine.bench.serve_load --clients 500 --requests 10000 --queue 64

A client asks for one picture at a time; when it is refused (429) it comes again after the time that
it was told, or after --patience where that is less. In the same run, before and after: `sdengine
batch` on the same model, with the same steps. One line of JSON is printed.

All clients live in one event loop on the machine that they load, so they are niced: what they take
from the server would be counted as the server's. The probe of /health/live is a process of its own,
not niced.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from .serve_client import SDENGINE, Answer, Client, Server, metric, percentile, ready

STAGES, TOTAL = "sdengine_stage_seconds_sum", '{stage="total"}'
PROMPT = "a red heart"
FIRST = 1000  # requests after which memory must stay as it is
POLITE = 5  # niceness of the clients
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
    return {"prompt": PROMPT, "seed": k, "steps": steps, "sampler_name": "Euler"}


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


def batch_rate(arguments: argparse.Namespace) -> float:
    """Pictures a second of `sdengine batch`, from its first picture on the disk to its last."""
    with tempfile.TemporaryDirectory() as place:
        lines, out = Path(place, "lines.jsonl"), Path(place, "out")
        lines.write_text("".join(
            json.dumps({"prompt": PROMPT, "seed": k, "sampler": "euler", "guidance": 7.0}) + "\n"
            for k in range(arguments.pictures)
        ))  # fmt: skip
        common = json.dumps({"steps": arguments.steps, "prompt_weights": True, "long_prompt": True})
        command = [*SDENGINE, "batch", lines, "--out", out, "--model", arguments.model, "--threads",
                   arguments.threads, "--backend", arguments.backend, "--common", common,
                   "--quiet"]  # fmt: skip
        subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
        times = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    assert len(times) == arguments.pictures
    return (len(times) - 1) / (times[-1] - times[0])


async def overhead(server: Server, client: Client, steps: int, runs: int) -> dict[str, Any]:
    """Milliseconds that one picture alone takes beyond the pipeline's own, from its own clock; and
    of the server's processor time, which other programs on the machine do not change."""
    beyond, requests = [], []
    for k in range(runs):
        inside = await metric(client, STAGES, TOTAL)
        begun = time.perf_counter()
        answer = await client("POST", "/sdapi/v1/txt2img", body(k, steps))
        requests.append(time.perf_counter() - begun)
        assert answer.status == 200, answer.body
        beyond.append(requests[-1] - (await metric(client, STAGES, TOTAL) - inside))
    used = server.processor_s()
    for k in range(runs):
        await client("POST", "/sdapi/v1/txt2img", body(k, steps))
    used = (server.processor_s() - used) / runs
    return {"request_ms": 1e3 * percentile(requests, 0.5), "processor_ms": 1e3 * used,
            "overhead_ms": {"least": 1e3 * min(beyond), "p50": 1e3 * percentile(beyond, 0.5),
                            "p90": 1e3 * percentile(beyond, 0.9)}}  # fmt: skip


async def load(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    client = Client(server.url)
    await ready(client)
    single = await overhead(server, client, arguments.steps, 40)
    seen, numbers = Seen(), count()
    host, port = server.url.removeprefix("http://").split(":")
    probe = subprocess.Popen([sys.executable, "-c", PROBE, host, port], stdout=subprocess.PIPE,
                             text=True)  # fmt: skip
    os.setpriority(os.PRIO_PROCESS, 0, POLITE)  # on Linux: of this thread
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
    parser.add_argument("--threads", default="1", help="of the engine")
    parser.add_argument("--patience", type=float, default=4.0, help="seconds")
    parser.add_argument("--pictures", type=int, default=150, help="of the batch, twice")
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--backend", arguments.backend,
               "--threads", arguments.threads, "--queue", str(arguments.queue)]  # fmt: skip
    options += [] if arguments.batch is None else ["--batch", arguments.batch]
    rates = [batch_rate(arguments)]
    with Server(options) as server, ThreadPoolExecutor(1) as clients:
        found = clients.submit(asyncio.run, load(server, arguments)).result()
    rates.append(batch_rate(arguments))
    rate = sum(rates) / len(rates)
    found |= {"batch_per_s": rates, "of_the_batch": found["pictures_per_s"] / rate}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
