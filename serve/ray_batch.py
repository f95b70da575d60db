"""A batch on a Ray cluster: one worker on each GPU, or on each Ray node where there are none.

Ray places the runs, repeats those of a machine that was lost, and grows the cluster where it can.
A run is a task; the process that does it keeps its pipeline for the next one. Pictures come back
here and are written here: the machines need the model at the same place, and no common disk.

checked by  tests/serve/test_ray.py
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    MissingExtra,
    StorageError,
)
from .batch import Failed, Made, Report, pictures
from .plan import Item, Job

if TYPE_CHECKING:
    from ..engine.pipeline import Pipeline

AHEAD = 2  # runs handed to Ray for each worker: one runs, one waits
RETRIES = 5  # machines that one run may lose


def connect(address: str) -> Any:
    """The module ray, connected to a cluster: `auto`, `host:port`, `ray://...`; `local` makes one.

    raises      MissingExtra; BackendUnavailable when there is no cluster
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise MissingExtra(
            "--ray needs the package ray", hint="pip install 'sdengine[ray]'"
        ) from None
    if ray.is_initialized():
        return ray
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendUnavailable(
            f"no Ray cluster at {address}: {error}",
            hint="start one (`ray start --head`) and name its address, or take --ray local",
        ) from None
    return ray


def resources(ray: Any, cpus: float | None, gpus: float | None) -> dict[str, float]:
    """Of one worker: where they are not asked for, a GPU if the cluster has any, and all processors
    of its smallest node that has some (or of that node's share for each of its GPUs).

    raises      BackendUnavailable when no node has as much
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    fitting = [n for n in nodes if n.get("CPU", 0) > 0 and n.get("GPU", 0) >= gpus]
    if cpus is None and fitting:
        cpus = min(n["CPU"] // max(1.0, n.get("GPU", 0) if gpus else 1.0) for n in fitting)
    if cpus is None or not any(n["CPU"] >= cpus for n in fitting):
        has = [f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes]
        asked = "some processor" if cpus is None else f"{cpus:g} CPU"
        raise BackendUnavailable(
            f"no node of the Ray cluster has {asked} and {gpus:g} GPU; it has {'; '.join(has)}",
            hint="ask for less: --worker-cpus, --worker-gpus; or start a node that has them",
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


class Cluster:
    """address     see `connect`
    model       as each machine finds it: an embedded name, or the path of a bundle
    bundle      its id: a machine that has another one there is refused
    loading     backend, precision, threads, device, low_memory
    cpus, gpus  of one worker; None: see `resources`
    """

    most: int | None = 64  # as many as a line's batch_size allows

    def __init__(
        self,
        address: str,
        model: str,
        bundle: str,
        loading: Mapping[str, Any],
        cpus: float | None = None,
        gpus: float | None = None,
    ) -> None:
        self._address, self._model, self._bundle = address, model, bundle
        self._loading, self._cpus, self._gpus = dict(loading), cpus, gpus

    def run(self, work: Sequence[Job], report: Report) -> Iterator[Made | Failed]:
        ray = connect(self._address)
        each = resources(ray, self._cpus, self._gpus)
        loading = dict(self._loading)
        if "threads" not in loading and each["num_cpus"] >= 1:
            loading["threads"] = int(each["num_cpus"])
        task = ray.remote(make).options(
            **each, max_retries=RETRIES, scheduling_strategy="SPREAD", name="sdengine batch"
        )
        waiting, done = list(reversed(work)), 0
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and len(running) < AHEAD * _workers(ray, each):
                job = waiting.pop()
                try:
                    contents = _contents(job)
                except StorageError as error:
                    yield Failed(job.items, error)
                    done += len(job.items)
                    continue
                running[task.remote(self._model, self._bundle, loading, job, contents)] = job
            ready = ray.wait(list(running), num_returns=1)[0] if running else []
            for reference in ready:
                job = running.pop(reference)
                yield from self._found(ray, reference, job)
                done += len(job.items)
                report(done)

    def _found(self, ray: Any, reference: Any, job: Job) -> list[Made | Failed]:
        try:
            found: list[Made | Failed] = ray.get(reference)
            return found
        except ray.exceptions.RayError as error:
            lost = BackendError(
                f"line {job.items[0].line}: Ray could not do it: {str(error).splitlines()[0]}",
                hint="too little memory ends workers: give each more (--worker-cpus), or look into"
                " `ray status` and the logs of Ray",
            )
            return [Failed(job.items, lost)]


def _workers(ray: Any, each: Mapping[str, float]) -> int:
    """How many fit into the cluster as it is now, and one more: it may grow for work that waits."""
    total = ray.cluster_resources()
    named = {"num_cpus": "CPU", "num_gpus": "GPU"}
    fits = [total.get(named[name], 0.0) / size for name, size in each.items() if size > 0]
    return int(min(fits, default=1.0)) + 1


def _contents(job: Job) -> dict[str, bytes]:
    """The pictures given to it, by their paths here. Raises StorageError."""
    paths = [p for v in job.items[0].pictures.values() for p in ([v] if isinstance(v, str) else v)]
    try:
        return {path: Path(path).read_bytes() for path in paths}
    except OSError as error:
        raise StorageError(
            f"line {job.items[0].line}: cannot read {error.filename}: {error.strerror or error}",
            hint="it was there when the lines were checked: put it back, and start again",
        ) from None


def make(
    model: str, bundle: str, loading: dict[str, Any], job: Job, contents: dict[str, bytes]
) -> list[Made | Failed]:
    """One run, on the machine that Ray chose."""
    from ..engine.errors import SdengineError

    try:
        pipe = _pipeline(model, bundle, tuple(loading.items()), job.request.preset)
        return list(pictures(pipe, job, given=_given(job.items[0], contents)))
    except SdengineError as error:
        return [Failed(job.items, error)]


@functools.lru_cache(maxsize=1)
def _pipeline(
    model: str, bundle: str, loading: tuple[tuple[str, Any], ...], preset: str | None
) -> Pipeline:
    """Of this process: opened by its first run, kept for the others."""
    from .. import api

    pipe = api.load(model, **dict(loading), preset=preset)
    if pipe.bundle.id != bundle:
        raise BundleError(
            f"{model} on {os.uname().nodename} is bundle {pipe.bundle.id}, not {bundle}",
            hint="copy the bundle to the same path on each machine",
        )
    return pipe


def _given(item: Item, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """A path where the same file is here (the picture's metadata then names it), or its bytes."""

    def source(path: str) -> str | bytes:
        here = Path(path)
        same = here.is_file() and here.read_bytes() == contents[path]
        return path if same else contents[path]

    return {
        name: [source(path) for path in value] if isinstance(value, list) else source(value)
        for name, value in item.pictures.items()
    }
