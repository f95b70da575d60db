"""Servers in processes of their own, as users run them: the real command, real workers, real
sockets on the loopback. The fake backend's networks have known answers and cost next to nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

SDENGINE = [sys.executable, "-c", "from sdengine.cli import main; main()"]


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=self.headers, **options)

    def ready(self, limit: float = 60) -> None:
        end = time.monotonic() + limit
        with self.client() as client:
            while time.monotonic() < end:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health/ready").status_code == 200:
                        return
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.05)
        pytest.fail(f"not ready within {limit} s: {self.log.read_text()}")

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def stop(self, number: int = signal.SIGTERM, limit: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(limit)


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Native size 128 x 64; no preview."""
    place = Path(__file__).parents[1] / "tiny_bundle.py"
    spec = importlib.util.spec_from_file_location("tiny_bundle", place)
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("bundle") / "fake"
    tiny.write(folder, tiny.vocabulary())
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`start("--model", ...)`: a running server, stopped at the end of the session."""
    made: list[Server] = []

    def begin(*options: str, ready: bool = True, preexec: Any = None) -> Server:
        folder = tmp_path_factory.mktemp("server")
        log = folder / "log"
        environment = {
            **os.environ, "SDENGINE_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*SDENGINE, "serve", "--port", "0", *options], stdout=subprocess.PIPE,
                stderr=stream, text=True, env=environment, preexec_fn=preexec,
            )  # fmt: skip
        assert process.stdout is not None
        with process.stdout:
            url = process.stdout.readline().strip()
        assert url.startswith("http://"), log.read_text()
        server = Server(process, url, log)
        made.append(server)
        if ready:
            server.ready()
        return server

    yield begin
    for server in made:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def fake(start: Callable[..., Server], fake_bundle: Path) -> Server:
    """One server on the fake backend, for tests that leave it as it was."""
    return start("--model", str(fake_bundle), "--backend", "fake", "--batch", "4")


@pytest.fixture(scope="session")
def emoji(start: Callable[..., Server]) -> Server:
    """One server on the embedded model and a real engine."""
    return start("--model", "emoji", "--threads", "1", "--batch", "1")
