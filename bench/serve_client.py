"""What the scripts that load a server share: a server of their own, a lean HTTP client, figures.

The client is a few lines on asyncio streams: five hundred of a full one would take the processor
from the server that they measure.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

SDENGINE = [sys.executable, "-c", "from sdengine.cli import main; main()"]
IDLE_S = 3.0  # after which a server may have closed a connection that is kept


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, kept open and opened again when it is lost."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._used = 0.0

    async def __call__(self, method: str, path: str, body: Any = None) -> Answer:
        await self.send(method, path, body)
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        answer = Answer(
            int(head[0].split()[1]), headers,
            await self._reader.readexactly(int(headers["content-length"])),
        )  # fmt: skip
        self._used = time.monotonic()
        if headers.get("connection") == "close":
            self.close()
        return answer

    async def send(self, method: str, path: str, body: Any = None) -> None:
        if time.monotonic() - self._used > IDLE_S:
            self.close()
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._writer.write(head.encode() + data)
        await self._writer.drain()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Server:
    """`sdengine serve` with these options, ready; ended with the block."""

    def __init__(self, options: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*SDENGINE, "serve", "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def processor_s(self) -> float:
        """Seconds of processor time that the server itself, without its workers, has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server and of its workers."""
        pids = {"server": self.process.pid}
        pids |= {f"worker {k}": pid for k, pid in enumerate(self.workers())}
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            for name, pid in pids.items()
        }


async def ready(client: Client, limit: float = 120.0) -> None:
    end = time.monotonic() + limit
    while (await client("GET", "/health/ready")).status != 200:
        assert time.monotonic() < end, "the server does not become ready"
        await asyncio.sleep(0.1)


async def metric(client: Client, name: str, labels: str = "") -> float:
    """What /metrics says under a name, its labels as they are written there; 0 when it does not."""
    text = (await client("GET", "/metrics")).body.decode()
    start = f"{name}{labels} "
    lines = (line for line in text.splitlines() if line.startswith(start))
    return sum(float(line.removeprefix(start)) for line in lines)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
