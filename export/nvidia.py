"""A bundle made ready for NVIDIA's engines: typed graphs, and TensorRT-RTX engines built here.

    trt         strongly typed graphs, judged on the processor with the roundings of a GPU; TensorRT
                builds its engines from them on the machine that has the GPU
    trt-rtx     the same graphs, and engines for the kinds of GPU that are asked for

checked by  tests/parity/test_typed_export.py, tests/contract/test_trt_rtx.py
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import machine, plans
from ..backends.plan_build import capabilities, check_capability, job_for, load
from ..backends.plans import RTX, TRT, check_precision
from ..engine.bundle import MANIFEST, Bundle, ParityRecord, open_bundle
from ..engine.errors import RequestError, UnknownName
from ..engine.safety import COMPONENT as CLASSIFIER
from ..engine.spec import Component, Precision, is_band
from ..engine.tokenizer import Tokenizer
from . import write
from .builds import Planned, check_memory, need, run_builds
from .checkpoint import open_checkpoint
from .components import parts
from .parity import GATES, Gate, judge
from .quantize import LEAST_DB, Choice, fp8_choices
from .record import NATIVE, PROMPTS, record
from .repro import keep_repro, link
from .run import _cuts, _described, _merged, _within
from .shapes import Ask, check, profiles
from .targets.tensorrt import PRECISIONS, Emulated
from .typed import Written, write_typed

log = logging.getLogger("sdengine.export")

TARGETS = (TRT, RTX)
LIBRARY = "tensorrt_rtx"
DEFAULT: tuple[Precision, ...] = ("f16",)
LARGE = 1 << 30  # bytes of weights: beyond it the case of native size is left out

Report = Callable[[str, float], None]


def add_nvidia(
    path: Path,
    targets: Sequence[str],
    precisions: Sequence[Precision] = DEFAULT,
    ask: Ask | None = None,
    gates: Mapping[Precision, Gate] | None = None,
    progress: Report | None = None,
    prompts: Sequence[str] | None = None,
) -> Path:
    """Put typed graphs, and engines, into the bundle at `path`; returns it.

    What is there of the same fingerprint stays. The new bundle takes the old one's place.
    prompts     what fp8 is calibrated on; None: a built-in list
    raises      UnknownName, RequestError, BackendUnavailable (an SM, the library), BackendError
                (memory, a build), ParityFailure, BundleError, StorageError
    """
    ask = Ask() if ask is None else ask
    report: Report = progress if progress is not None else (lambda text, share: None)
    path = path.absolute()
    bundle = open_bundle(path)
    _check(targets, precisions, ask, bundle)
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    components = _traced(bundle)
    missing = [p for p in precisions if not all(p in c.typed for c in components.values())]
    with write.partial_folder(path, _room(bundle, missing)) as folder:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link(path / name, folder / name)
        networks = {
            (n, p): c.typed[p]
            for n, c in components.items()
            for p in precisions
            if p not in missing
        }
        if missing:
            networks |= _add_typed(
                bundle, folder, content, missing, {**GATES, **(gates or {})}, prompts,
                _within(report, 0.0, 0.5 if RTX in targets else 1.0),
            )  # fmt: skip
        _state(content, TRT, precisions)
        if RTX in targets:
            _add_engines(bundle, folder, content, networks, ask, _within(report, 0.5, 1.0))
            _state(content, RTX, precisions)
        write.finish(folder, path, content)
    report("done", 1.0)
    return path


def _check(
    targets: Sequence[str], precisions: Sequence[Precision], ask: Ask, bundle: Bundle
) -> None:
    """All that can be refused before any work."""
    for target in targets:
        if target not in TARGETS:
            raise UnknownName("target", target, TARGETS)
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
    check(ask.shapes, bundle)
    if RTX not in targets:
        return
    trt = load(LIBRARY)
    for sm in ask.sms:
        check_capability(trt, sm)
    if not ask.sms:
        known = ",".join(map(str, capabilities(trt)))
        raise RequestError(
            "for which GPUs should TensorRT-RTX engines be built?",
            hint=f"name their compute capabilities: --sm 86,89,120; it knows {known}",
        )
    for sm in ask.sms:
        for precision in precisions:
            check_precision(precision, sm)


def _traced(bundle: Bundle) -> dict[str, Component]:
    """All that came from the checkpoint: a classifier's graph is somebody else's, and stays."""
    return {name: c for name, c in bundle.components.items() if name != CLASSIFIER}


def _room(bundle: Bundle, missing: Sequence[Precision]) -> int:
    weights = sum(c.weights.stat().st_size for c in bundle.components.values())
    return weights * len(missing)


def _state(content: dict[str, Any], target: str, precisions: Sequence[Precision]) -> None:
    """Say in the manifest what the bundle is ready for."""
    entry = content["targets"].setdefault(target, {"precisions": [], "files": []})
    entry["precisions"] += [p for p in precisions if p not in entry["precisions"]]


# Typed graphs


def _add_typed(
    bundle: Bundle,
    folder: Path,
    content: dict[str, Any],
    precisions: Sequence[Precision],
    gates: Mapping[Precision, Gate],
    prompts: Sequence[str] | None,
    report: Report,
) -> dict[tuple[str, Precision], Component]:
    """Write and judge the typed networks; the manifest is told."""
    weights = {n: c.weights for n, c in bundle.components.items()}
    described = parts(bundle.facts, open_checkpoint(bundle.path).configs, _cuts(bundle))
    tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
    ids = np.array([tokenizer.encode(p).ids for p in PROMPTS], np.int64)
    cases = record(described, weights, bundle.facts, ids, _within(report, 0.0, 0.5))
    choices: Mapping[str, Choice] = {}
    if "fp8" in precisions:
        choices = fp8_choices(bundle, prompts, cases, _within(report, 0.5, 0.6))
    found: dict[tuple[str, Precision], Component] = {}
    records: list[ParityRecord] = []
    steps = [(p, c) for p in precisions for c in _traced(bundle).values()]
    for i, (precision, component) in enumerate(steps):
        name = component.spec.name
        report(f"typed graphs of {name} in {precision}", 0.6 + 0.4 * i / len(steps))
        large = component.weights.stat().st_size > LARGE
        chosen = [c for c in cases[name] if not large or c.name != NATIVE]
        rounded = choices.get(name) if precision == "fp8" else None
        ways = [None] if rounded is None else [rounded, None]  # the second: the first is too coarse
        for choice in ways:
            written = write_typed(component, bundle.path, folder, precision, choice)
            judged = judge(
                written.component, Emulated(), precision, chosen, gates[precision],
                keep=partial(keep_repro, bundle.path),
            )  # fmt: skip
            if choice is None or not _too_coarse(name, judged):
                break
            log.info("%s computes in float16: %g dB are due", name, LEAST_DB[name])
            for file in written.files:
                file.unlink()
        records += judged
        _describe(content, folder, component, precision, written)
        found[name, precision] = written.component
    content["parity"] = _merged(content["parity"], [asdict(r) for r in records])
    return found


def _too_coarse(name: str, records: Sequence[ParityRecord]) -> bool:
    """Whether the pictures of a network in 8 bits would show it."""
    found = [r.psnr_db for r in records if r.graph == "full" and r.psnr_db is not None]
    return min(found, default=np.inf) < LEAST_DB.get(name, 0.0)


def _describe(
    content: dict[str, Any],
    folder: Path,
    component: Component,
    precision: Precision,
    written: Written,
) -> None:
    entry = content["components"][component.spec.name]
    described = _described(folder, written.component)
    entry.setdefault("typed", {})[precision] = {
        "graphs": described["graphs"],
        "weights": described["weights"],
        "source": written.source,
        "recipe": dict(written.recipe),
    }
    hashes = {described["weights"]: written.component.weights_sha256}
    content["files"] |= write.listed(folder, written.files, hashes)


# Engines


def _add_engines(
    bundle: Bundle,
    folder: Path,
    content: dict[str, Any],
    networks: Mapping[tuple[str, Precision], Component],
    ask: Ask,
    report: Report,
) -> None:
    """Build what is asked for and not there yet; the manifest is told."""
    version = str(load(LIBRARY).__version__)
    target = content["targets"].setdefault(RTX, {"precisions": [], "files": []})
    entries = {e["file"]: e for e in target.get("engines", [])}
    planned: dict[str, Planned] = {}
    for (name, precision), network in networks.items():
        for graph in network.graphs.values():
            if is_band(graph.name):
                continue  # of a size that follows from the tiles: built where one is used
            for dims in profiles(ask.shapes, bundle, network, graph):
                for sm in ask.sms:
                    file = plans.engine_path(name, graph.name, precision, dims, sm)
                    content_of = plans.what(network, graph.name, dims)
                    print_of = plans.fingerprint(content_of, plans.made(LIBRARY, version, sm))
                    if file in entries and entries[file]["fingerprint"] == print_of:
                        continue
                    # A stale engine under this name is shared with the bundle that is there.
                    (folder / file).unlink(missing_ok=True)
                    job = job_for(graph, dims, LIBRARY, folder / file, sm)
                    label = f"{name}/{graph.name} {precision} sm{sm} {plans.shapes_text(dims)}"
                    planned[file] = Planned(job, label, need(_weight_bytes(graph.path)))
                    entries[file] = {
                        "file": file,
                        "component": name,
                        "precision": precision,
                        "graph": graph.name,
                        "sm": sm,
                        "dims": {d: list(span) for d, span in dims.items()},
                        "version": version,
                        "fingerprint": print_of,
                    }
    available = machine.available_memory()
    check_memory(planned.values(), available)
    jobs = ask.jobs if ask.jobs is not None else (os.cpu_count() or 1)
    run_builds(list(planned.values()), available, jobs, report)
    target["engines"] = list(entries.values())
    target["files"] = sorted({*target["files"], *entries})
    content["files"] |= write.listed(folder, [folder / f for f in planned])


def _weight_bytes(graph: Path) -> int:
    """Of the file's tensors that a graph takes."""
    import onnx_ir as ir

    held = [v.const_value for v in ir.load(graph).graph.initializers.values()]
    return sum(t.nbytes for t in held if isinstance(t, ir.ExternalTensor))
