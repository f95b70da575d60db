"""What a component is: its tensors, its graphs, and the shapes it is compiled for.

These types are the common language of the bundle's reader, the backends and the engine. They hold
facts only; nothing here opens a file or touches an engine library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

Dim = int | str
DType = Literal["float32", "int64"]
Precision = Literal["f32", "bf16", "f16", "int8", "fp8"]

DTYPES: tuple[str, ...] = ("float32", "int64")
BAND = re.compile(r"inner|outer\d+")
PRECISIONS: tuple[str, ...] = ("f32", "bf16", "f16", "int8", "fp8")


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. A dimension is a number, or the name of one that is chosen later."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers; a name that `dims` lacks is a KeyError (our own mistake)."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ComponentSpec:
    """The signature of a component, the same on every backend and in every precision."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions that a Profile fixes, in order of first appearance."""
        return named_dims(self.inputs)

    def input(self, name: str) -> TensorSpec:
        return next(t for t in self.inputs if t.name == name)


def named_dims(tensors: Iterable[TensorSpec]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(d for t in tensors for d in t.shape if isinstance(d, str)))


@dataclass(frozen=True)
class Graph:
    """One ONNX file of a component: `full`, `prologue`, `deep`, `shallow<k>`, `inner`, `outer<k>`.

    A prologue computes, once per prompt, what the other graphs take as further inputs: tensors of
    the same names appear in its `outputs` and in their `inputs`. `deep` is `full` that also gives
    `features<k>`, and `shallow<k>` takes them in the place of all that lies below skip k. `inner`
    and `outer<k>` are the network in pieces, which run one after the other: see engine/bands.py.

    macs    multiply-adds of one picture's half at the model's native size; None: not counted
    """

    name: str
    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int | None = None


@dataclass(frozen=True)
class Engine:
    """One graph compiled ahead of time for a kind of GPU: a file that only its library can read.

    target       `trt-rtx`
    sm           compute capability of the GPU, 89 for 8.9
    dims         named dimension of the graph's inputs -> least, best, largest size it was built for
    version      of the library that built it, and that alone can run it
    fingerprint  of all that went into it: see backends/plans.py
    """

    target: str
    graph: str
    path: Path
    sm: int
    dims: Mapping[str, tuple[int, int, int]]
    version: str
    fingerprint: str


@dataclass(frozen=True)
class Component:
    """All that a backend needs to load one network.

    config       the network's constructor arguments (for the torch backends)
    weights      one safetensors file, canonical LDM names and layouts
    key          content hash over weights and graphs: the cache key of compiled artefacts
    quantised    precision -> the same network with graphs and weights of its own
    typed        precision -> the same network with strongly typed graphs: every tensor says in the
                 graph what it is computed in, as TensorRT demands. int8, fp8: Q/DQ, float16 beside
    engines      of a typed network: what was compiled of it ahead of time
    """

    spec: ComponentSpec
    graphs: Mapping[str, Graph]
    weights: Path
    weights_sha256: str
    config: Mapping[str, Any]
    key: str
    quantised: Mapping[Precision, Component] = field(default_factory=dict)
    typed: Mapping[Precision, Component] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ()

    def at(self, precision: Precision) -> Component:
        """What is loaded for this precision: its own graphs and weights, where there are such."""
        return self.quantised.get(precision, self)


def features_name(cut: int) -> str:
    """The tensor that `deep` gives and `shallow<cut>` takes."""
    return f"features{cut}"


def cut_of(features: str) -> int:
    """The reverse of `features_name`."""
    return int(features.removeprefix("features"))


def is_band(graph: str) -> bool:
    """Whether this is a piece of a network that was cut at its norms."""
    return BAND.fullmatch(graph) is not None


def bands_of(component: Component) -> tuple[str, ...]:
    """Names of a network's pieces in the order in which they run; none where it was not cut."""
    graphs = component.graphs
    if "inner" not in graphs:
        return ()
    outer = tuple(f"outer{k}" for k in range(sum(map(is_band, graphs)) - 1))
    begins = graphs["inner"].inputs == component.spec.inputs
    return ("inner", *outer) if begins else (*outer, "inner")


def signature(component: Component, graph: str) -> ComponentSpec:
    """What a session takes and gives that runs this graph of the component.

    Of a piece of the network: its own tensors alone. Of others:
    The component's own tensors, and behind them what the graph takes and gives beside these and
    the results of the prologue: cached features. A graph that it lacks is a KeyError.
    """
    own, chosen = component.spec, component.graphs[graph]
    if is_band(graph):
        return ComponentSpec(own.name, chosen.inputs, chosen.outputs)
    prologue = component.graphs.get("prologue")
    given = () if prologue is None else prologue.outputs
    known = {t.name for t in (*own.inputs, *own.outputs, *given)}
    inputs, outputs = (
        tuple(t for t in tensors if t.name not in known)
        for tensors in (chosen.inputs, chosen.outputs)
    )
    return ComponentSpec(own.name, own.inputs + inputs, own.outputs + outputs)


@dataclass(frozen=True)
class Profile:
    """The shapes and the precision to compile for.

    dims        a number for each named dimension; a name that is absent stays dynamic
    precision   of the arithmetic inside; inputs and outputs stay float32 and int64
    threads     processor threads for this session; None lets the backend choose
    pin         each thread stays on one core
    hyper_threads   threads may share a core
    fast_only   of a processor with two kinds of cores, the fast ones alone; None: it has one kind
    device      what a backend with several devices runs on: "CPU", "GPU.1"; None: its own default
    paired      the second half of the rows of `sample` and `timestep` repeats the first, as
                guidance has it: a backend may compute what depends on nothing else once
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    precision: Precision = "f32"
    threads: int | None = None
    pin: bool = False
    hyper_threads: bool = False
    fast_only: bool | None = None
    device: str | None = None
    paired: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", MappingProxyType(dict(sorted(self.dims.items()))))

    def __hash__(self) -> int:
        return hash((tuple(self.dims.items()), self.precision, self.threads, self.device))

    def label(self) -> str:
        """`bf16 B2 h64 w64`: for messages and file names."""
        return " ".join([self.precision, *(f"{k}{v}" for k, v in self.dims.items())])
