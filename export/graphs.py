"""The graphs of one component: traced, bound to weights, cleaned, split, cut; each step judged.

checked by  tests/parity/test_graphs.py, tests/parity/test_cut.py, tests/parity/test_bands.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ..engine.spec import Component, Graph
from ..engine.weights import Stored, read_header
from .components import Part, band_spec
from .graph.count import multiply_adds
from .graph.cut import cut
from .graph.hoist import hoist
from .graph.tidy import tidy
from .graph.tools import save, specs
from .graph.weights import bind_weights
from .trace import trace

WEIGHTS = "weights.safetensors"
Models = Mapping[str, ir.Model]  # graph name -> model
Judge = Callable[[Component, str], None]  # candidate, what was last done to it


@dataclass(frozen=True)
class Place:
    """Where a component is being put together: its folder, and the hash of its weights."""

    folder: Path
    weights_sha256: str

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def build_graphs(part: Part, place: Place, judge: Judge) -> Component:
    """The finished component, its graphs saved in `place`.

    judge       is asked after each pass, about the graphs as they are then; raises ParityFailure
    """
    traced = trace(part.empty(), part.spec, prefix=part.prefix, multiples=part.multiples)
    stored = read_header(place.weights)
    bound: Models = {"full": bind_weights(traced, stored, location=WEIGHTS)}
    judge(_saved(part, place, bound), "traced")
    clean: Models = {"full": tidy(bound["full"])}
    if len(clean["full"].graph) != len(bound["full"].graph):
        judge(_saved(part, place, clean), "tidied")
    split = hoist(clean["full"], part.hoisted)
    final = clean if split is None else {"prologue": split.prologue, "full": split.rest}
    cuts = cut(final["full"], part.features)
    component = _saved(part, place, {**final, **cuts, **_bands(part, stored)})
    judge(component, "")
    return component


def _bands(part: Part, stored: Mapping[str, Stored]) -> Models:
    """Graphs of the network cut at its norms, where it is to be."""
    models = {}
    for band in part.bands(part.empty()):
        # A convolution of stride 2 keeps what lies at even places.
        multiples = dict.fromkeys(("h", "w", "H", "W"), 2)
        traced = trace(band.module, band_spec(part, band), prefix=part.prefix, multiples=multiples)
        models[band.name] = tidy(bind_weights(traced, stored, location=WEIGHTS))
    return models


def _saved(part: Part, place: Place, models: Models) -> Component:
    """The component with these graphs, each in its file, over those of the pass before."""
    graphs = {}
    for name, model in models.items():
        path = place.folder / f"{name}.onnx"
        save(model, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        inputs, outputs = specs(model.graph.inputs), specs(model.graph.outputs)
        macs = None if part.native is None else multiply_adds(model, part.native)
        graphs[name] = Graph(name, path, sha256, inputs, outputs, macs)
    return keyed(
        Component(part.spec, graphs, place.weights, place.weights_sha256, part.config, key="")
    )


def keyed(component: Component) -> Component:
    """With a key that depends on content alone."""
    content = {
        "weights": component.weights_sha256,
        "graphs": {n: g.sha256 for n, g in component.graphs.items()},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return replace(component, key=digest)
