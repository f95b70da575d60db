"""TensorRT and TensorRT-RTX: engines from the bundle, or built here on first use and kept.

SDENGINE_TRT=strip builds engines without weights, where the library can: a small plan is kept, and
each start gives it the bundle's own weights.

No torch, no memory of the host between rows: what a session holds stays on the device, cached
features and a prologue's results are handles, and `denoiser` runs a whole table there. Proved
without a GPU only: on recorded calls, and on the kernels compiled for a processor.

checked by  tests/unit/test_backend_tensorrt.py, tests/unit/test_denoise.py
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

from ..engine.errors import ArtifactMismatch, BackendError, BackendUnavailable
from ..engine.ports import Array, Job, Probe, Step
from ..engine.spec import Component, Graph, Precision, Profile, named_dims
from . import plans
from .base import GraphBackend, Run, first_line, kept_by
from .cache import Store, open_store
from .cuda.board import TableBoard
from .cuda.device import MIB, Device, Facts, device_index
from .cuda.engines import EngineRun, Lanes, Messages, Opened, deserialize, refit
from .denoise import denoise

log = logging.getLogger("sdengine.backends")

OLDEST_SM = 75  # Turing: what both libraries still take
# Of the weights' size: the engine, the builder's copy of it, and tactics that are being timed.
BUILD_FACTOR = 3.0
BUILD_LEAST = 512 * MIB
UNPROVED = "this runtime is unproved on H100 and H200"


class Build(Protocol):
    """Builds one engine in a process of its own. Raises BackendError, BackendUnavailable."""

    def __call__(
        self,
        library: str,
        graph: Graph,
        dims: Mapping[str, plans.Span],
        facts: Facts,
        strip: bool,
    ) -> bytes: ...


def open_device(index: int) -> Device:
    from .cuda.driver import Driver

    return Driver(index)


class TensorRT(GraphBackend):
    """device      by number; another than NVIDIA's driver in tests
    library     its module; None imports it
    strip       keep engines without weights; None: as SDENGINE_TRT says
    """

    name = "trt"
    target: ClassVar[str] = plans.TRT
    mend: ClassVar[str] = "pip install 'tensorrt>=10.8' 'cuda-python>=12.8'"

    def __init__(
        self,
        store: Store | None = None,
        device: Callable[[int], Device] = open_device,
        library: Any = None,
        build: Build | None = None,
        strip: bool | None = None,
    ) -> None:
        self._strip = os.environ.get("SDENGINE_TRT") == "strip" if strip is None else strip
        self._store, self._open_device, self._given = store, device, library
        self._build = build_apart if build is None else build
        self._messages = Messages()
        self._lock = threading.Lock()
        self._devices: dict[int, Lanes] = {}
        self._runtimes: dict[int, Any] = {}
        self._engines: WeakValueDictionary[tuple[object, ...], Opened] = WeakValueDictionary()

    def probe(self) -> Probe:
        return self._probe

    def probe_on(self, device: str) -> Probe:
        """Of the library and its first GPU; whether that one is there is seen when it is opened."""
        try:
            device_index(device)
        except BackendUnavailable as error:
            return Probe(False, error.message, error.hint)
        return self._probe

    @cached_property
    def _probe(self) -> Probe:
        try:
            version = self._version
            facts = self._lanes(0).device.facts()
            self._check_device(facts)
        except BackendUnavailable as error:
            return Probe(False, f"{error.message}; {UNPROVED}", error.hint)
        except Exception as error:
            return Probe(False, f"{self._module} cannot be used: {first_line(error)}", self.mend)
        reason = (
            f"{self._title} {version} on {facts.name} (sm{facts.sm},"
            f" {facts.memory / 1e9:.0f} GB); {UNPROVED}"
        )
        known: tuple[Precision, ...] = ("f16", "bf16", "f32", "int8", "fp8")
        able = tuple(p for p in known if facts.sm >= plans.LEAST_SM.get(p, 0))
        return Probe(True, reason, precisions=able, speed=50)

    @property
    def _module(self) -> str:
        return plans.LIBRARIES[self.target]

    @property
    def _title(self) -> str:
        return {plans.TRT: "TensorRT", plans.RTX: "TensorRT-RTX"}[self.target]

    @cached_property
    def _library(self) -> Any:
        """Raises BackendUnavailable."""
        if self._given is not None:
            return self._given
        try:
            return importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                f"the package {self._module} is not installed", hint=self.mend
            ) from error

    @property
    def _version(self) -> str:
        return str(self._library.__version__)

    def _lanes(self, index: int) -> Lanes:
        if index not in self._devices:
            self._devices[index] = Lanes(self._open_device(index))
        return self._devices[index]

    def _check_device(self, facts: Facts) -> None:
        if facts.sm < OLDEST_SM:
            raise BackendUnavailable(
                f"{self._title} does not run on {facts.name}: its compute capability is"
                f" {facts.sm / 10:.1f}, the least is {OLDEST_SM / 10:.1f}",
                hint="`sdengine doctor` lists what can run here; onnxruntime-cuda and torch-cuda"
                " take older GPUs",
            )

    def _network(self, component: Component, profile: Profile) -> Component:
        facts = self._lanes(device_index(profile.device)).device.facts()
        plans.check_precision(profile.precision, facts.sm)
        if profile.precision == "f32":
            return component
        return plans.typed(component, profile.precision)

    def compile(self, component: Component, graph: Graph, profile: Profile) -> EngineGraph:
        lanes = self._lanes(device_index(profile.device))
        facts = lanes.device.facts()
        self._check_device(facts)
        key = (component.weights_sha256, graph.sha256, profile, facts.index)
        with self._lock:  # of several threads that ask for the same engine, one makes it
            opened = self._engines.get(key)
            if opened is None:
                made = self._engine(component, graph, profile, facts)
                opened = self._engines[key] = Opened(made)
        return EngineGraph(self._library, opened, self._messages, component, graph, lanes)

    def _engine(self, network: Component, graph: Graph, profile: Profile, facts: Facts) -> Any:
        """Out of the bundle, out of the cache, or built now; each no is said with its reason.

        raises  BackendError: a size is left open, too little memory, what the builder said
        """
        whose = f"{network.spec.name}/{graph.name}"
        if self.target == plans.RTX:
            found = plans.find(network, graph.name, profile.dims, facts.sm, self._version)
            if not isinstance(found, str):
                try:
                    return self._open(found.path.read_bytes(), whose, facts)
                except ArtifactMismatch as error:
                    found = error.message
            log.info("%s: building here: %s", whose, found)
        if left := [d for d in named_dims(graph.inputs) if d not in profile.dims]:
            raise BackendError(
                f"{self.name} builds {whose} for fixed sizes; {', '.join(left)} is open",
                hint="give the Profile a number for each dimension; engines for ranges of sizes"
                " are built ahead of time, by `sdengine export BUNDLE --target trt-rtx`",
            )
        spans = plans.spans(graph, profile.dims)
        if self._strip:
            try:
                return self._kept(network, graph, profile, spans, facts, strip=True)
            except BackendError as error:
                log.info("%s: with its weights, for: %s", whose, error.message)
        return self._kept(network, graph, profile, spans, facts, strip=False)

    def _kept(
        self,
        network: Component,
        graph: Graph,
        profile: Profile,
        spans: Mapping[str, plans.Span],
        facts: Facts,
        *,
        strip: bool,
    ) -> Any:
        """Out of the cache, or built now and put there. Raises as `_engine`."""
        whose = f"{network.spec.name}/{graph.name}"

        def opened(plan: bytes) -> Any:
            engine = self._open(plan, whose, facts)
            if strip:
                refit(self._library, self._messages, engine, graph, whose)
            return engine

        store = open_store() if self._store is None else self._store
        recipe = plans.STRIPPED if strip else plans.RECIPE
        what = {
            "backend": self.name,
            "precision": profile.precision,
            **plans.what(network, graph.name, spans, recipe),
        }
        driver = ".".join(map(str, facts.driver))
        made = plans.made(self._module, self._version, facts.sm)
        made |= {"GPU": facts.name, "driver": f"CUDA {driver}"}
        path = None if store is None else store.find(what, made)
        if path is not None and store is not None:
            try:
                return opened(path.read_bytes())
            except ArtifactMismatch as error:
                store.discard(what, made, error.message)
        plan = self._built(network, graph, spans, facts, strip)
        if store is not None:
            store.keep(what, made, lambda file: file.write(plan))
        try:
            return opened(plan)
        except ArtifactMismatch as error:
            if store is not None:
                store.discard(what, made, error.message)
            raise

    def _built(
        self,
        network: Component,
        graph: Graph,
        spans: Mapping[str, plans.Span],
        facts: Facts,
        strip: bool,
    ) -> bytes:
        """Raises BackendError: too little memory, said before; what the builder said."""
        need = max(int(BUILD_FACTOR * network.weights.stat().st_size), BUILD_LEAST)
        if facts.free < need:
            raise BackendError(
                f"building {network.spec.name}/{graph.name} takes about {need // MIB} MiB of the"
                f" GPU's memory; {facts.free // MIB} of {facts.memory // MIB} MiB are free on"
                f" cuda:{facts.index} ({facts.name})",
                hint="end what else runs there (`nvidia-smi`), take engines built elsewhere"
                " (`sdengine export BUNDLE --target trt-rtx --sm"
                f" {facts.sm}`), or a smaller precision",
            )
        return self._build(self._module, graph, spans, facts, strip)

    def _open(self, plan: bytes, whose: str, facts: Facts) -> Any:
        """Raises ArtifactMismatch."""
        self._lanes(facts.index).device.enter()
        if facts.index not in self._runtimes:
            library = self._library
            self._runtimes[facts.index] = library.Runtime(self._messages.logger(library))
        hint = (
            f"it is for another GPU or version, or damaged; here is {self._title}"
            f" {self._version} on sm{facts.sm}. Build it again: `sdengine export BUNDLE --target"
            f" {self.target}`, or remove it from the bundle"
        )
        return deserialize(self._runtimes[facts.index], self._messages, plan, whose, hint)

    def denoiser(self, job: Job) -> Iterator[Step] | None:
        """The whole table on the device: ports.Denoiser."""
        found = {key: getattr(session, "runner", None) for key, session in job.sessions.items()}
        runners = {key: r for key, r in found.items() if isinstance(r, EngineRun)}
        if not runners or len(runners) < len(found):
            return None
        lane = next(iter(runners.values())).lanes.mine()
        return denoise(job, TableBoard(lane, job, runners))


class TensorRTRTX(TensorRT):
    name = "trt-rtx"
    target = plans.RTX
    mend = "pip install 'tensorrt-rtx-cu13>=1.7' 'cuda-python>=13'"


class EngineGraph:
    """One graph of one network; each run of it is an execution context of its own."""

    def __init__(
        self, library: Any, opened: Opened, messages: Messages, component: Component, graph: Graph,
        lanes: Lanes,
    ) -> None:  # fmt: skip
        self._library, self._messages, self._graph, self._lanes = library, messages, graph, lanes
        self._opened: Opened | None = opened
        self._whose = f"{component.spec.name}/{graph.name}"
        self._kept = kept_by(component, graph)
        lanes.enter(self)

    def open(self, held: Mapping[str, Array]) -> Run:
        assert self._opened is not None, "a closed network opens nothing"
        return EngineRun(
            self._library, self._opened, self._messages, self._graph, self._whose, self._lanes,
            held, self._kept,
        )  # fmt: skip

    def close(self) -> None:
        self._opened = None
        self._lanes.leave(self)


def build_apart(
    library: str, graph: Graph, dims: Mapping[str, plans.Span], facts: Facts, strip: bool
) -> bytes:
    """`Build` by backends/plan_build.py: on this machine's GPU, in a process of its own."""
    plan_build = importlib.import_module(".plan_build", __package__)
    with tempfile.TemporaryDirectory(prefix="sdengine-") as folder:
        out = Path(folder) / "engine"
        sm = facts.sm if library == plans.LIBRARIES[plans.RTX] else None
        plan_build.build_apart(plan_build.job_for(graph, dims, library, out, sm, strip))
        return out.read_bytes()
