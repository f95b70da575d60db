"""Builds side by side: never more memory than there is, one failure ends the rest."""

from __future__ import annotations

import threading
import time

import pytest

from sdengine.backends.plan_build import Built, Job
from sdengine.engine.errors import BackendError
from sdengine.export.builds import Planned, check_memory, need, run_builds

GB = 10**9


def planned(count: int, size: int) -> list[Planned]:
    return [Planned(Job("x", f"{i}.onnx", "", {}, 89), f"engine {i}", size) for i in range(count)]


class Builder:
    """Counts the builds that run at one time."""

    def __init__(self, fails: str = "") -> None:
        self.most = self.now = self.begun = 0
        self._lock, self._fails = threading.Lock(), fails

    def __call__(self, job: Job) -> Built:
        with self._lock:
            self.now += 1
            self.begun += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self._lock:
            self.now -= 1
        if job.onnx == self._fails:
            raise BackendError("no kernel", hint="none")
        return Built(1.0, 5_000_000, 2 * GB, "1")


@pytest.mark.parametrize(
    ("size", "available", "jobs", "most"),
    [
        (2 * GB, 5 * GB, 4, 2),
        (2 * GB, 50 * GB, 4, 4),
        (2 * GB, 50 * GB, 1, 1),
        (2 * GB, None, 4, 1),
    ],
)
def test_as_many_at_once_as_memory_allows(
    size: int, available: int | None, jobs: int, most: int
) -> None:
    builder, said = Builder(), list[tuple[str, float]]()
    done = run_builds(
        planned(6, size), available, jobs, lambda *report: said.append(report), builder
    )
    assert builder.most == most
    assert len(done) == 6
    assert sorted(share for _, share in said) == pytest.approx([i / 6 for i in range(1, 7)])
    assert said[0][0].endswith("5.0 MB in 1 s, peak 2.0 GB")


def test_the_first_failure_is_raised_and_the_rest_given_up() -> None:
    builder = Builder(fails="1.onnx")
    with pytest.raises(BackendError, match="no kernel"):
        run_builds(planned(40, GB), 100 * GB, 2, lambda *report: None, builder)
    assert builder.begun < 40


def test_too_little_memory_is_said_before_anything_is_built() -> None:
    check_memory(planned(3, 6 * GB), 7 * GB)
    check_memory(planned(3, 6 * GB), None)
    with pytest.raises(BackendError) as caught:
        check_memory(planned(3, 6 * GB), 4 * GB)
    assert "engine 0 needs about 6.0 GB of memory; 4.0 GB are free" in caught.value.message
    assert "portable" in caught.value.hint


@pytest.mark.parametrize(
    ("weights", "peak"),  # bytes of weights, peak memory of a build, both as measured
    [(1_676_000_000, 5_626_000_000), (680_000_000, 2_402_000_000), (99_000_000, 582_000_000)],
)
def test_the_estimate_is_above_what_was_measured(weights: int, peak: int) -> None:
    assert peak < need(weights) < 1.4 * peak
