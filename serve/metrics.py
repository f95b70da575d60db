"""What Prometheus is told: a registry of each server's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .jobs import Job

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STAGES = ("load", "text", "prepare", "denoise", "decode", "total")


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.waiting = Gauge("sdengine_queue_waiting", "Requests that wait.", registry=registry)
        self.running = Gauge("sdengine_queue_running", "Requests that run.", registry=registry)
        self.waited = Histogram(
            "sdengine_queue_seconds", "From arrival to start.", buckets=SECONDS, registry=registry
        )
        self.stages = Histogram(
            "sdengine_stage_seconds", "Of one network run, by stage.", ["stage"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.jobs = Counter("sdengine_jobs", "Jobs, by how they ended.", ["state"],
                            registry=registry)  # fmt: skip
        self.pictures = Counter("sdengine_pictures", "Pictures made.", registry=registry)
        self.refused = Counter("sdengine_refusals", "Requests refused, by why.", ["why"],
                               registry=registry)  # fmt: skip
        self.restarts = Counter("sdengine_worker_restarts", "Workers lost and started again.",
                                registry=registry)  # fmt: skip
        self.memory = Gauge("sdengine_memory_bytes", "Resident memory.", ["process"],
                            registry=registry)  # fmt: skip

    def ran(self, timings: Mapping[str, float], pictures: int) -> None:
        for stage in STAGES:
            if stage in timings:
                self.stages.labels(stage).observe(timings[stage])
        self.pictures.inc(pictures)

    def ended(self, job: Job) -> None:
        self.jobs.labels(job.state).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
