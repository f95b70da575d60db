"""Many builds of engines: each in a process of its own, as many at once as memory allows.

checked by  tests/unit/test_export_builds.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from ..backends.plan_build import Built, Job, build_apart
from ..engine.errors import BackendError

# Peak memory of a build, measured with TensorRT-RTX 1.7.1 and rounded up: docs/numerics.md.
BASE = 400 << 20  # the library itself, and what it writes for each node
WEIGHTS = 3.5  # times the bytes of the weights that a graph takes


@dataclass(frozen=True)
class Planned:
    """A build to come: the job, what to call it, and the memory that it may need, in bytes."""

    job: Job
    label: str
    need: int


def need(weights: int) -> int:
    """Bytes of memory for the build of a graph that takes so many bytes of weights."""
    return int(BASE + WEIGHTS * weights)


def check_memory(planned: Iterable[Planned], available: int | None) -> None:
    """Raises BackendError, with the number, when one of them will not fit: before any is begun."""
    for one in planned:
        if available is not None and one.need > available:
            raise BackendError(
                f"building {one.label} needs about {one.need / 1e9:.1f} GB of memory; "
                f"{available / 1e9:.1f} GB are free here",
                hint="close other programs, or build on a machine with more memory: the engine is "
                "portable, and `--out FOLDER` with it",
            )


def run_builds(
    planned: Sequence[Planned],
    available: int | None,
    most: int,
    report: Callable[[str, float], None],
    build: Callable[[Job], Built] = build_apart,
) -> dict[str, Built]:
    """Build all of them; label -> what it took.

    available   bytes of memory for all builds at once; None: not known, one at a time
    most        builds at once
    raises      BackendError: the first that failed; those not begun are given up
    """
    gate = _Memory(available)
    done: dict[str, Built] = {}

    def one(plan: Planned) -> Built:
        with gate.held(plan.need):
            return build(plan.job)

    with ThreadPoolExecutor(max(1, most if available is not None else 1)) as pool:
        futures = {pool.submit(one, p): p for p in planned}
        try:
            for future in as_completed(futures):
                plan = futures[future]
                done[plan.label] = built = future.result()
                report(
                    f"{plan.label}: {built.size / 1e6:,.1f} MB in {built.seconds:.0f} s, "
                    f"peak {built.peak / 1e9:.1f} GB",
                    len(done) / len(planned),
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


class _Memory:
    """Bytes that builds share; one that would not fit waits for another to end."""

    def __init__(self, available: int | None) -> None:
        self._left = available
        self._running = 0
        self._changed = threading.Condition()

    def held(self, amount: int) -> _Held:
        return _Held(self, amount)

    def take(self, amount: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fits(amount))
            self._add(-amount, 1)

    def give(self, amount: int) -> None:
        with self._changed:
            self._add(amount, -1)
            self._changed.notify_all()

    def _fits(self, amount: int) -> bool:
        return self._left is None or self._running == 0 or amount <= self._left

    def _add(self, amount: int, builds: int) -> None:
        self._left = None if self._left is None else self._left + amount
        self._running += builds


@dataclass
class _Held:
    memory: _Memory
    amount: int

    def __enter__(self) -> None:
        self.memory.take(self.amount)

    def __exit__(self, *_: object) -> None:
        self.memory.give(self.amount)
