"""Bad days under load: workers killed, clients that go in the middle, SIGTERM. Nothing may be lost.

    python -m sdengine.bench.serve_faults --model BUNDLE --backend fake --kills 50 --gone 200

One line of JSON is printed; the exit status is 1 when a request got no answer, or one that is not
documented.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

from .serve_client import Answer, Client, Server, metric, ready


def body(k: int) -> dict[str, Any]:
    return {"prompt": f"picture {k}", "seed": k, "steps": 60, "sampler": "restart"}


async def ask(url: str, first: int, step: int, over: asyncio.Event, codes: Counter[Any]) -> None:
    client, k = Client(url), first
    while not over.is_set():
        try:
            answer = await asyncio.wait_for(client("POST", "/v1/images/generations", body(k)), 120)
            codes[answer.status] += 1
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            codes[repr(error)[:60]] += 1
            client.close()
        k += step


async def kill(server: Server, client: Client, times: int) -> None:
    for _ in range(times):
        await ready(client)
        while await metric(client, "sdengine_queue_running") == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        os.kill(server.workers()[0], signal.SIGKILL)
        while (await client("GET", "/health/ready")).status == 200:
            await asyncio.sleep(0.01)
    await ready(client)


async def go(url: str, times: int) -> None:
    """Clients that hang up while their picture is made, or waits."""
    for k in range(times):
        client = Client(url)
        await client.send("POST", "/v1/images/generations", {**body(k), "n": 8})
        await asyncio.sleep(0.02 * (k % 5))
        client.close()


async def faults(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    client = Client(server.url)
    await ready(client)
    codes: Counter[Any] = Counter()
    over = asyncio.Event()
    askers = [
        asyncio.create_task(ask(server.url, k, arguments.clients, over, codes))
        for k in range(arguments.clients)
    ]
    begun = time.perf_counter()
    await kill(server, client, arguments.kills)
    killed_s = time.perf_counter() - begun
    await go(server.url, arguments.gone)
    over.set()
    await asyncio.gather(*askers)
    for _ in range(200):
        if not await _busy(client):
            break
        await asyncio.sleep(0.05)
    final = await client("POST", "/v1/images/generations", body(0))
    return {
        "answers": {str(code): n for code, n in codes.items()},
        "restarts": await metric(client, "sdengine_worker_restarts_total"),
        "called_off": await metric(client, "sdengine_jobs_total", '{state="cancelled"}'),
        "still_busy": await _busy(client),
        "then": final.status,
        "seconds_per_restart": killed_s / max(arguments.kills, 1),
    }


async def told_to_stop(server: Server, clients: int) -> dict[str, Any]:
    """SIGTERM while that many requests run and wait: each is finished, or handed back with 503."""
    client = Client(server.url)

    async def arrived() -> float:
        return await _busy(client) + await metric(client, "sdengine_jobs_total", '{state="done"}')

    before = await arrived()
    calls = [
        asyncio.create_task(Client(server.url)("POST", "/v1/images/generations", body(k)))
        for k in range(clients)
    ]
    while await arrived() - before < clients:
        await asyncio.sleep(0.01)
    begun = time.perf_counter()
    server.process.terminate()
    found = await asyncio.gather(*calls, return_exceptions=True)
    status = await asyncio.to_thread(server.process.wait, 60)
    codes = Counter(one.status if isinstance(one, Answer) else repr(one)[:60] for one in found)
    return {"answers": {str(code): n for code, n in codes.items()}, "exit_status": status,
            "seconds": time.perf_counter() - begun}  # fmt: skip


async def _busy(client: Client) -> float:
    waiting = await metric(client, "sdengine_queue_waiting")
    return waiting + await metric(client, "sdengine_queue_running")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--gone", type=int, default=200)
    parser.add_argument("--stopped", type=int, default=40, help="requests at the SIGTERM")
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--backend", arguments.backend, "--threads", "1",
               "--grace", "2"]  # fmt: skip
    with Server(options) as server:
        found = asyncio.run(faults(server, arguments))
        stopped = found["sigterm"] = asyncio.run(told_to_stop(server, arguments.stopped))
    sys.stdout.write(json.dumps(found) + "\n")
    good = set(found["answers"]) <= {"200", "429", "500"} and found["still_busy"] == 0
    good = good and set(stopped["answers"]) <= {"200", "503"} and stopped["exit_status"] == 0
    sys.exit(0 if good and found["then"] == 200 else 1)


if __name__ == "__main__":
    main()
