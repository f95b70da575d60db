"""The worker of sdengine itself: what peers/protocol.py asks, answered through the public API.

A process of its own for each row: `python -m sdengine.bench.worker`. Nothing but the protocol is
imported before the first question, so that starting and importing can be told apart.
"""

from __future__ import annotations

import time
from typing import Any

BEGUN = time.monotonic()

from .peers import protocol  # noqa: E402 (the clock comes first)


class Ours:
    """One pipeline: planned with, loaded, run."""

    def __init__(self) -> None:
        self._pipe: Any = None
        self._watch: Any = None
        self._spawned = BEGUN

    def plan(self, model: str, backends: list[str]) -> dict[str, Any]:
        """What the model is, what it weighs on disk, and which backends can run it how."""
        from .. import api
        from .. import backends as registry
        from ..engine.bundle import open_bundle
        from ..engine.errors import UnknownName

        bundle = open_bundle(api.find_model(model))
        able: dict[str, Any] = {}
        for name in backends:
            try:
                probe = registry.get(name).probe()
            except UnknownName as error:
                able[name] = {"ok": False, "reason": error.message, "mend": error.hint}
                continue
            proved = bundle.targets[name].precisions if name in bundle.targets else ()
            usable = [p for p in probe.precisions if p == "f32" or p in proved]
            facts = {"ok": probe.ok, "reason": probe.reason, "mend": probe.mend}
            able[name] = {**facts, "precisions": usable}
        return {"model": model_facts(bundle), "backends": able}

    def load(self, options: dict[str, Any], spawned: float, **_: Any) -> dict[str, Any]:
        """options     keyword arguments of sdengine.load
        spawned     time.monotonic() when this process was started"""
        self._spawned = spawned
        start = time.monotonic()
        from .. import api
        from ..engine import pipeline, request  # noqa: F401 (counted as import)
        from .meter import Watch

        imported = time.monotonic()
        self._pipe = api.load(**options)
        self._watch = Watch.on(self._pipe)
        loaded = time.monotonic()
        return {
            "interpreter_s": BEGUN - spawned,
            "import_s": imported - start,
            "load_s": loaded - imported,
            "seconds": loaded - start,
            "about": self._pipe.about,
        }

    def run(self, request: dict[str, Any], picture: str | None = None) -> dict[str, Any]:
        """A whole run. `picture`: where its first picture goes, as an array."""
        first: list[float] = []

        def on_step(_: Any) -> None:
            if not first:
                first.append(time.monotonic() - self._spawned)

        self._watch.clear()
        start = time.perf_counter()
        result = self._pipe(**request, on_step=on_step)
        seconds = time.perf_counter() - start
        protocol.keep_picture(picture, result.image)
        timings = result.timings
        return {
            "seconds": seconds,
            "first_step_at": first[0],
            "done_at": time.monotonic() - self._spawned,
            "rows": timings.rows,
            "stages": {
                "load_s": timings.load,
                "text_s": timings.text,
                "denoise_s": timings.denoise,
                "decode_s": timings.decode,
                "own_s": timings.own,
                "total_s": timings.total,
            },
            "calls": self._watch.calls(),
            "request": result.request.to_dict(),
            "warnings": result.warnings,
        }


def rate(precision: str, threads: int | None) -> dict[str, Any]:
    """The machine's rate of matrix products: see ceiling.py."""
    from ..backends import machine
    from . import ceiling

    count = machine.threads() if threads is None else threads
    return {"rate": ceiling.measure(precision, count).to_dict()}


def model_facts(bundle: Any) -> dict[str, Any]:
    """What identifies a bundle, its graphs, and its size on disk."""
    components = bundle.components
    return {
        "path": str(bundle.path),
        "name": bundle.facts.name,
        "variant": bundle.facts.variant,
        "native_size": list(bundle.facts.native_size),
        "bundle": bundle.id,
        "sha256": bundle.facts.source.sha256,
        "bytes": sum(record.size for record in bundle.files.values()),
        "graphs": {
            name: {g: str(graph.path) for g, graph in component.graphs.items()}
            for name, component in components.items()
        },
    }


if __name__ == "__main__":
    ours = Ours()
    protocol.serve({"plan": ours.plan, "load": ours.load, "run": ours.run, "rate": rate})
