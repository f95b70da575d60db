"""What every backend does alike: guards, holding inputs fixed, and the prologue.

A backend brings two small things: `compile`, which turns one graph into a `Compiled`, and
`Compiled.open`, which gives a callable for it with some inputs held fixed. The rest is here, so
that no backend can forget it: what is handed in is checked, a closed session refuses, an engine
library's exception becomes a BackendError, and a network that was split into `prologue` and step
graphs behaves as one. Where there are several step graphs, each is compiled when it is first asked
for: a run holds those alone that it runs.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from ..engine.errors import (
    BackendError,
    BackendUnavailable,
    CorruptPart,
    FeedMismatch,
    MissingPart,
    SdengineError,
    SessionClosed,
)
from ..engine.ports import Array, Probe
from ..engine.spec import (
    Component,
    ComponentSpec,
    Graph,
    Profile,
    is_band,
    named_dims,
    signature,
)
from .guard import Guard

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class Compiled(Protocol):
    """One graph, compiled."""

    def open(self, held: Mapping[str, Array]) -> Run:
        """A callable that takes the inputs that `held` lacks, and returns all outputs.

        held      never changes afterwards: may be put on the device, or be shared as it is
        feeds     right in name, dtype and shape, C-contiguous; not kept beyond the call
        returns   arrays that the backend will not touch again
        Callables of one Compiled are independent: what one holds, another never sees.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Resting(Protocol):
    """A compiled graph that keeps memory between calls, and can do without."""

    def rest(self) -> None:
        """Let go of it: no callable is open. The next call takes it anew."""
        ...


class GraphBackend(ABC):
    """Base of the backends.

    whole   takes a network as it is (torch), with no prologue: the graphs that it sees have the
            inputs of the component, and behind them cached features
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False

    @abstractmethod
    def probe(self) -> Probe: ...

    def probe_on(self, device: str) -> Probe:
        """As `probe`, for a device that was asked for. Raises UnknownName, never anything else."""
        other = "torch-cuda" if device.startswith("cuda") else "openvino"
        mend = f"sdengine run --device {device} --backend {other}"
        why = f"{self.name} takes no device; openvino (GPU) and the NVIDIA backends (cuda:1) do"
        return Probe(False, why, mend)

    @abstractmethod
    def compile(self, component: Component, graph: Graph, profile: Profile) -> Compiled:
        """Compile or open one graph. What it raises becomes a BackendError."""

    def load(self, component: Component, profile: Profile) -> GraphSession:
        """A session that runs `full`; its `graph` gives others.

        Compiled now: the prologue, and the step graph where there is one only. Of several, each is
        compiled when it is first asked for, or first called.
        raises  BackendUnavailable, FeedMismatch (a bad dimension), CorruptPart, BackendError
        """
        self._check(component.spec, profile)
        component = self._network(component, profile)
        network = Network(self, component, profile, self._graphs(component), {})
        steps = [name for name in network.graphs if name != "prologue"]
        try:
            if "prologue" in network.graphs:
                network.part("prologue")
            if len(steps) == 1:
                network.part(steps[0])
            return GraphSession(network, "full", {}, {}, owner=True)
        except SdengineError:
            network.close()
            raise

    def _network(self, component: Component, profile: Profile) -> Component:
        """What is loaded for a precision."""
        return component.at(profile.precision)

    def _graphs(self, component: Component) -> dict[str, Graph]:
        """The graphs as this backend sees them."""
        if not self.whole:
            return dict(component.graphs)
        specs = {n: signature(component, n) for n in component.graphs if n != "prologue"}
        return {
            n: replace(component.graphs[n], inputs=s.inputs, outputs=s.outputs)
            for n, s in specs.items()
        }

    def _check(self, spec: ComponentSpec, profile: Profile) -> None:
        probe = self.probe() if profile.device is None else self.probe_on(profile.device)
        if not probe.ok:
            raise BackendUnavailable(
                f"backend {self.name} cannot run here: {probe.reason}",
                hint=probe.mend if probe.mend else "`sdengine doctor` lists what can run",
            )
        if profile.precision not in probe.precisions:
            raise BackendUnavailable(
                f"{self.name} cannot compute {spec.name} in {profile.precision} here",
                hint=f"it can in {', '.join(probe.precisions)}; `sdengine doctor` lists the others",
            )
        known = named_dims((*spec.inputs, *spec.outputs))
        for dim, size in profile.dims.items():
            if dim in known and size >= 1:
                continue
            raise FeedMismatch(
                f"{spec.name} cannot be loaded with dimension {dim} = {size}",
                hint=f"its dimensions are {', '.join(known) or 'all fixed'}; each is 1 or more, or "
                "left out to stay free",
            )


@dataclass
class Network:
    """The graphs that all sessions of one load share, and what of them is compiled.

    members   the sessions: closing the network must let go of their buffers too
    """

    backend: GraphBackend
    component: Component
    profile: Profile
    graphs: Mapping[str, Graph]
    compiled: dict[str, Compiled]

    def __post_init__(self) -> None:
        self.members: weakref.WeakSet[GraphSession] = weakref.WeakSet()

    def part(self, name: str) -> Compiled:
        """One graph, compiled now if it is not yet. Raises BackendError, CorruptPart."""
        if name not in self.compiled:
            backend, component, profile = self.backend, self.component, self.profile
            try:
                self.compiled[name] = backend.compile(component, self.graphs[name], profile)
            except SdengineError:
                raise
            except Exception as error:
                raise BackendError(
                    f"{backend.name} cannot load {self.named(name)} for {profile.label()}: "
                    f"{first_line(error)}",
                    hint="`sdengine inspect --verify` tells whether the bundle is whole, `sdengine "
                    "doctor` which other backends can run",
                ) from error
        return self.compiled[name]

    def named(self, graph: str) -> str:
        """`unet`, or `unet/shallow1`: for messages."""
        name = self.component.spec.name
        return name if graph in ("full", "prologue") else f"{name}/{graph}"

    def close(self) -> None:
        for session in list(self.members):
            session.drop()
        for part in self.compiled.values():
            part.close()
        self.compiled.clear()


class GraphSession:
    """A loaded network, or a view of one with some inputs held. One call at a time.

    runs      the graph that a call runs
    held      inputs of the component that are fixed, and the sizes that they fix
    derived   what the prologue gave for them; empty where `held` lacks an input that it takes
    owner     `close` closes the network and every view of it; a view lets go of what it holds
    """

    def __init__(
        self,
        network: Network,
        runs: str,
        held: Mapping[str, Array],
        derived: Mapping[str, Array],
        *,
        sizes: Mapping[str, int] | None = None,
        owner: bool = False,
    ) -> None:
        self._network = network
        self._runs = runs
        self._spec = signature(network.component, runs)
        self._held = dict(held)
        self._derived = dict(derived)
        self._sizes = {} if sizes is None else dict(sizes)
        self._owner = owner
        self._guard = Guard(self._spec, network.profile, held.keys(), self._sizes)
        ready = runs in network.compiled
        self._run: Run | None = self._prepare() if ready else self._first
        network.members.add(self)

    @property
    def spec(self) -> ComponentSpec:
        return self._spec

    @property
    def runner(self) -> Run:
        """The callable of the graph that a call runs, made now: for the backend's own denoiser.

        raises  SessionClosed, BackendError
        """
        if self._run is None:
            raise self._closed()
        if self._run == self._first:
            self._run = self._prepare()
        return self._run

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Results belong to the caller.

        raises  SessionClosed; FeedMismatch: names, dtypes, shapes; BackendError: the library failed
        """
        run = self._run
        if run is None:
            raise self._closed()
        feeds = self._guard.check(feeds)
        try:
            return run(feeds)
        except SdengineError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def bind(self, feeds: Mapping[str, Array]) -> GraphSession:
        """A view with these inputs held: as copies, so that the caller's may change.

        The prologue runs here, once, as soon as all that it takes is held.
        raises  SessionClosed, FeedMismatch, BackendError, as a call does
        """
        if self._run is None:
            raise self._closed()
        sizes = self._sizes | self._guard.check_some(feeds)
        held = self._held | {n: np.array(v, order="C") for n, v in feeds.items()}
        network, derived = self._network, self._derived
        try:
            prologue = network.graphs.get("prologue")
            if prologue is not None and not derived and _names(prologue) <= held.keys():
                run = network.compiled["prologue"].open({})
                derived = run({n: held[n] for n in _names(prologue)})
            return GraphSession(network, self._runs, held, derived, sizes=sizes)
        except SdengineError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def graph(self, name: str) -> GraphSession:
        """A view that runs another graph, and shares what is held and the prologue's results.

        raises  SessionClosed; MissingPart: the bundle has no such graph; BackendError
        """
        network = self._network
        if self._run is None:
            raise self._closed()
        if name == "prologue" or name not in network.graphs:
            steps = ", ".join(n for n in network.graphs if n != "prologue")
            raise MissingPart(
                f"{network.component.spec.name} has no graph {name!r}; it has {steps}",
                hint="`sdengine export BUNDLE --out FOLDER` makes a bundle with all graphs of a "
                "bundle that lacks some; without a feature cache `full` is enough",
            )
        network.part(name)
        known = {t.name for t in signature(network.component, name).inputs}
        held = _pick(self._held, known)
        try:
            return GraphSession(network, name, held, self._derived, sizes=self._sizes)
        except SdengineError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """May be called again, and after the network was closed. A piece of a network that was cut
        at its norms gives back the memory of its calls: there are many, and one runs at a time."""
        if self._owner:
            self._network.close()
        self.drop()
        part = self._network.compiled.get(self._runs)
        if is_band(self._runs) and isinstance(part, Resting):
            part.rest()

    def drop(self) -> None:
        self._run = None
        self._held, self._derived = {}, {}

    def _prepare(self) -> Run:
        """The callable behind this session: its graph alone, or prologue and graph in turn."""
        network, graphs = self._network, self._network.graphs
        takes = _names(graphs[self._runs])
        run_step = network.part(self._runs).open(_pick(self._held | self._derived, takes))
        if "prologue" not in graphs or self._derived:
            return run_step
        first = _names(graphs["prologue"])
        run_prologue = network.part("prologue").open(_pick(self._held, first))

        def both(feeds: Mapping[str, Array]) -> dict[str, Array]:
            return run_step(_pick({**feeds, **run_prologue(_pick(feeds, first))}, takes))

        return both

    def _first(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The first call of a session whose graph was not compiled when it was made."""
        self._run = self._prepare()
        return self._run(feeds)

    def _closed(self) -> SessionClosed:
        network = self._network
        return SessionClosed(
            f"the session of {network.named(self._runs)} ({network.backend.name}, "
            f"{network.profile.label()}) was closed",
            hint="load it again; a session ends with its own `close`, with that of the session it "
            "was bound from, and with the pipeline that owns it",
        )

    def _failed(self, error: Exception) -> BackendError:
        network = self._network
        return BackendError(
            f"{network.backend.name} failed while running {network.named(self._runs)} "
            f"({network.profile.label()}): {first_line(error)}",
            hint="if memory is short, ask for a smaller size or batch; another backend (`sdengine "
            "doctor` lists them) tells whether the model or the library is at fault",
        )


def first_line(error: BaseException) -> str:
    """What an engine library said, without the stack of its source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def agree(component: Component, graph: Graph, inputs: set[str], outputs: set[str]) -> None:
    """The library must see the tensors that the manifest names, and no others: CorruptPart."""
    for what, listed, found in (
        ("inputs", {t.name for t in graph.inputs}, inputs),
        ("outputs", {t.name for t in graph.outputs}, outputs),
    ):
        if listed != found:
            raise CorruptPart(
                f"{graph.path}: the {what} of {component.spec.name}/{graph.name} are "
                f"{', '.join(sorted(found))}; the manifest names {', '.join(sorted(listed))}",
                hint="export the bundle again: this graph and its manifest do not belong together",
            )


def kept_by(component: Component, graph: Graph) -> frozenset[str]:
    """Results that the caller only hands on, so that they may stay on a device; of a band none."""
    if is_band(graph.name):
        return frozenset()
    return frozenset(t.name for t in graph.outputs) - {t.name for t in component.spec.outputs}


def _names(graph: Graph) -> frozenset[str]:
    return frozenset(t.name for t in graph.inputs)


def _pick(values: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
    return {name: value for name, value in values.items() if name in names}
