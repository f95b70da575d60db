"""What every backend does alike: guards, holding inputs fixed, and the prologue.

A backend brings two small things: `compile`, which turns one graph into a `Compiled`, and
`Compiled.open`, which gives a callable for it with some inputs held fixed. The rest is here, so
that no backend can forget it: what is handed in is checked, a closed session refuses, an engine
library's exception becomes a BackendError, and a network that was split into `prologue` and `full`
behaves as one.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from ..engine.errors import (
    BackendError,
    BackendUnavailable,
    CorruptPart,
    FeedMismatch,
    SdengineError,
    SessionClosed,
)
from ..engine.ports import Array, Probe
from ..engine.spec import Component, ComponentSpec, Graph, Profile, named_dims
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


class GraphBackend(ABC):
    """Base of the backends.

    whole   takes a network as it is (torch), not cut into graphs: sees one graph, `full`, with the
            inputs and outputs of the component
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False

    @abstractmethod
    def probe(self) -> Probe: ...

    @abstractmethod
    def compile(self, component: Component, graph: Graph, profile: Profile) -> Compiled:
        """Compile or open one graph. What it raises becomes a BackendError."""

    def load(self, component: Component, profile: Profile) -> GraphSession:
        """Raises BackendUnavailable, FeedMismatch (a bad dimension), CorruptPart, BackendError."""
        self._check(component.spec, profile)
        network = Network(self.name, component.spec, profile, self._graphs(component), {})
        try:
            for name, graph in network.graphs.items():
                network.compiled[name] = self.compile(component, graph, profile)
            return GraphSession(network, {}, {}, owner=True)
        except Exception as error:
            network.close()
            if isinstance(error, SdengineError):
                raise
            raise BackendError(
                f"{self.name} cannot load {component.spec.name} for {profile.label()}: "
                f"{first_line(error)}",
                hint="`sdengine inspect --verify` tells whether the bundle is whole, `sdengine "
                "doctor` which other backends can run",
            ) from error

    def _graphs(self, component: Component) -> dict[str, Graph]:
        """The graphs to compile: `full`, and its `prologue` where there is one."""
        graphs, spec = component.graphs, component.spec
        if self.whole:
            return {"full": replace(graphs["full"], inputs=spec.inputs, outputs=spec.outputs)}
        return {name: graphs[name] for name in ("prologue", "full") if name in graphs}

    def _check(self, spec: ComponentSpec, profile: Profile) -> None:
        probe = self.probe()
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
    """The compiled graphs that all sessions of one load share.

    members   the sessions: closing the network must let go of their buffers too
    """

    backend: str
    spec: ComponentSpec
    profile: Profile
    graphs: Mapping[str, Graph]
    compiled: dict[str, Compiled]

    def __post_init__(self) -> None:
        self.members: weakref.WeakSet[GraphSession] = weakref.WeakSet()

    def close(self) -> None:
        for session in list(self.members):
            session.drop()
        for part in self.compiled.values():
            part.close()
        self.compiled.clear()


class GraphSession:
    """A loaded network, or a view of one with some inputs held. One call at a time.

    held      inputs of the component that are fixed, and the sizes that they fix
    derived   what the prologue gave for them; empty where `held` lacks an input that it takes
    owner     `close` closes the network and every view of it; a view lets go of what it holds
    """

    def __init__(
        self,
        network: Network,
        held: Mapping[str, Array],
        derived: Mapping[str, Array],
        *,
        sizes: Mapping[str, int] | None = None,
        owner: bool = False,
    ) -> None:
        self._network = network
        self._held = dict(held)
        self._derived = dict(derived)
        self._sizes = {} if sizes is None else dict(sizes)
        self._owner = owner
        self._guard = Guard(network.spec, network.profile, held.keys(), self._sizes)
        self._run: Run | None = self._prepare()
        network.members.add(self)

    @property
    def spec(self) -> ComponentSpec:
        return self._network.spec

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
            return GraphSession(network, held, derived, sizes=sizes)
        except SdengineError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """May be called again, and after the network was closed."""
        if self._owner:
            self._network.close()
        self.drop()

    def drop(self) -> None:
        self._run = None
        self._held, self._derived = {}, {}

    def _prepare(self) -> Run:
        """The callable behind this session: `full` alone, or prologue and full in turn."""
        compiled, graphs = self._network.compiled, self._network.graphs
        takes = _names(graphs["full"])
        run_full = compiled["full"].open(_pick(self._held | self._derived, takes))
        if "prologue" not in graphs or self._derived:
            return run_full
        first = _names(graphs["prologue"])
        run_prologue = compiled["prologue"].open(_pick(self._held, first))

        def both(feeds: Mapping[str, Array]) -> dict[str, Array]:
            return run_full(_pick(feeds, takes) | run_prologue(_pick(feeds, first)))

        return both

    def _closed(self) -> SessionClosed:
        network = self._network
        return SessionClosed(
            f"the session of {self.spec.name} ({network.backend}, {network.profile.label()}) "
            "was closed",
            hint="load it again; a session ends with its own `close`, with that of the session it "
            "was bound from, and with the pipeline that owns it",
        )

    def _failed(self, error: Exception) -> BackendError:
        network = self._network
        return BackendError(
            f"{network.backend} failed while running {self.spec.name} "
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


def _names(graph: Graph) -> frozenset[str]:
    return frozenset(t.name for t in graph.inputs)


def _pick(values: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
    return {name: value for name, value in values.items() if name in names}
