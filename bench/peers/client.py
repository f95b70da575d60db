"""The asking end of the line protocol: a worker process, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from ...engine.errors import BackendError

TIMEOUT = 1800.0  # seconds for one answer: loading a full model from a cold disk fits in


class Worker:
    """A child process that answers questions. A context manager; leaving it ends the process.

    spawned     time.monotonic() at its start; the same clock in all processes of a machine
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # closed with the worker
        self.spawned = time.monotonic()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **({} if env is None else env)},
                # Ctrl-C is for us: we end it, when the results are saved; and its children with it
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise BackendError(
                f"the worker {command[0]} cannot be started: {error.strerror}",
                hint="make its environment: python -m sdengine.bench.peers.envs",
            ) from error
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, op: str, timeout: float = TIMEOUT, **rest: Any) -> dict[str, Any]:
        """One question, one answer. Raises BackendError: refused, dead, or no answer in time."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the missing answer says so
            self._process.stdin.write(json.dumps({"op": op, **rest}) + "\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise BackendError(
                f"no answer to {op!r} within {timeout:g} s",
                hint="give the worker more time, or a smaller case",
            ) from None
        if line is None:
            raise BackendError(f"{self._death()} at {op!r}", hint=self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise BackendError(answer["error"], hint=answer["hint"])
        return answer

    def _death(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"the worker ended with status {status}"
        name = signal.Signals(-status).name
        memory = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{memory}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"it said: {lines[-1]}" if lines else "it said nothing"

    def pause(self) -> None:
        """Hold its threads and children, so that none spins while another worker is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """To it and to what it started: compilers, a program that it drives."""
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it and what it started, paused or not; twice does no harm."""
        if self._log.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
