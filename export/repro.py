"""What is kept of a parity failure: inputs, both outputs, the graphs, and one command.

    python -m sdengine.export.repro FOLDER

checked by  tests/parity/test_parity.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.ports import Array, Backend
from ..engine.spec import Component, ComponentSpec, Graph, Precision, Profile, TensorSpec
from ..engine.weights import read_header
from .parity import distance
from .record import Case
from .targets import get as get_target
from .write import tensors

FACTS = "case.json"


def keep_repro(
    out: Path,
    component: Component,
    case: Case,
    results: Mapping[str, Array],
    backend: Backend,
    precision: Precision,
) -> Path:
    """A folder beside `out` with all that repeats this case; weights are linked, not copied."""
    stem = f"{out.name}.parity-{component.spec.name}-"
    folder = Path(tempfile.mkdtemp(prefix=stem, dir=out.parent))
    kept: dict[str, Any] = {"inputs": case.feeds, "reference": case.outputs, "candidate": results}
    for name, arrays in kept.items():
        np.savez(folder / f"{name}.npz", **arrays)
    link(component.weights, folder / component.weights.name)
    for graph in component.graphs.values():
        link(graph.path, folder / graph.path.name)
    facts = {
        "component": component.spec.name,
        "backend": backend.name,
        "precision": precision,
        "dims": case.dims(component.spec),
        "inputs": tensors(component.spec.inputs),
        "outputs": tensors(component.spec.outputs),
        "weights": component.weights.name,
        "weights_sha256": component.weights_sha256,
        "config": dict(component.config),
        "key": component.key,
        "graphs": {
            name: {
                "name": g.name,
                "file": g.path.name,
                "sha256": g.sha256,
                "inputs": tensors(g.inputs),
                "outputs": tensors(g.outputs),
            }
            for name, g in component.graphs.items()
        },
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder


def link(source: Path, to: Path) -> None:
    """A second name for a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def repeat(folder: Path) -> list[str]:
    """Run the kept case again; one line an output."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    session = (
        get_target(facts["backend"])
        .backend()
        .load(_component(folder, facts), Profile(facts["dims"], facts["precision"]))
    )
    with np.load(folder / "inputs.npz") as feeds, np.load(folder / "reference.npz") as wanted:
        results = session({name: feeds[name] for name in feeds.files})
        session.close()
        found = {name: distance(wanted[name], results[name]) for name in wanted.files}
    return [
        f"{facts['component']} {name}: max abs {d.max_abs:.3g}, PSNR {d.psnr_db:.2f} dB {d.fault}"
        for name, d in found.items()
    ]


def _component(folder: Path, data: dict[str, Any]) -> Component:
    graphs = {
        name: Graph(
            g["name"], folder / g["file"], g["sha256"], _specs(g["inputs"]), _specs(g["outputs"])
        )
        for name, g in data["graphs"].items()
    }
    spec = ComponentSpec(data["component"], _specs(data["inputs"]), _specs(data["outputs"]))
    weights = folder / data["weights"]
    read_header(weights)
    return Component(spec, graphs, weights, data["weights_sha256"], data["config"], data["key"])


def _specs(listed: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in listed)


if __name__ == "__main__":
    sys.stdout.write("\n".join(repeat(Path(sys.argv[1]))) + "\n")
