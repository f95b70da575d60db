"""Parity: a graph against what torch computed in float32 from the same weights.

checked by  tests/parity/test_parity.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..engine.bundle import ParityRecord
from ..engine.errors import ParityFailure
from ..engine.ports import Array, Backend
from ..engine.spec import Component, ComponentSpec, Precision, Profile, is_band, signature
from .record import NATIVE, Case, free_memory


@dataclass(frozen=True)
class Gate:
    """What is required of one output.

    psnr_db     at least; the peak is the range of the reference
    max_abs     at most this share of the reference's deviation; None: not asked
    """

    psnr_db: float
    max_abs: float | None = None

    def __str__(self) -> str:
        share = "" if self.max_abs is None else f"max abs {self.max_abs:g} of deviation, "
        return f"{share}PSNR {self.psnr_db:g} dB"


GATES: Mapping[Precision, Gate] = {
    "f32": Gate(80.0, 1e-3),
    "f16": Gate(40.0),
    "bf16": Gate(40.0),
    "int8": Gate(25.0),
    "fp8": Gate(30.0),  # 4 significant bits: one operand alone is 31 dB from what it was
}


@dataclass(frozen=True)
class Distance:
    """psnr_db is infinite when the two are equal. `fault` says why there is no distance."""

    max_abs: float
    psnr_db: float
    fault: str = ""


@dataclass(frozen=True)
class Verdict:
    record: ParityRecord
    passed: bool
    fault: str


def distance(reference: Array, candidate: Array) -> Distance:
    """How far apart two arrays of one shape are."""
    for name, x in (("reference", reference), ("candidate", candidate)):
        if not np.isfinite(x).all():
            return Distance(np.inf, -np.inf, f"the {name} has NaN or infinity")
        if np.ptp(x) == 0:
            return Distance(np.inf, -np.inf, f"the {name} is constant")
    error = candidate.astype(np.float64) - reference
    mean = float(np.mean(error**2))
    peak = float(np.ptp(reference))
    psnr = np.inf if mean == 0 else 10 * float(np.log10(peak**2 / mean))
    return Distance(float(np.abs(error).max()), psnr)


def meets(gate: Gate, found: Distance, reference: Array) -> bool:
    limit = np.inf if gate.max_abs is None else gate.max_abs * float(np.std(reference))
    return not found.fault and found.psnr_db >= gate.psnr_db and found.max_abs <= limit


OnFailure = Callable[[Component, Case, Mapping[str, Array], Backend, Precision], Path]


def judge(
    component: Component,
    backend: Backend,
    precision: Precision,
    cases: Sequence[Case],
    gate: Gate,
    *,
    stage: str = "",
    keep: OnFailure,
) -> list[ParityRecord]:
    """Run each graph of the component on recorded inputs: how far from the reference it is.

    stage       what was last done to the graph, when it is not finished yet
    keep        writes what is needed to repeat a failure, and returns where
    raises      ParityFailure at the first case that misses the gate; BackendError
    """
    component = component.at(precision)
    records: list[ParityRecord] = []
    for graph in component.graphs:
        if graph == "prologue":
            continue
        alone = _alone(component, graph)
        # The others are cut from `full`, which was judged at native size: small cases are enough.
        chosen = [c for c in cases if graph == "full" or c.name != NATIVE]
        chosen = [c.bands[graph] for c in chosen] if is_band(graph) else chosen
        fitting = [_fitting(case, alone.spec) for case in chosen]
        records += _judge_graph(alone, graph, backend, precision, fitting, gate, stage, keep)
    return records


def _alone(component: Component, graph: str) -> Component:
    """A component of which this is the only step graph, `full`."""
    kept = {n: g for n, g in component.graphs.items() if n == "prologue"}
    kept["full"] = component.graphs[graph]
    return replace(component, spec=signature(component, graph), graphs=kept)


def _fitting(case: Case, spec: ComponentSpec) -> Case:
    """The case for one graph: features are results of `deep` and feeds of `shallow<k>`."""
    known = {**case.outputs, **case.feeds}
    feeds = {t.name: known[t.name] for t in spec.inputs}
    return Case(case.name, feeds, {t.name: known[t.name] for t in spec.outputs})


def _judge_graph(
    component: Component,
    graph: str,
    backend: Backend,
    precision: Precision,
    cases: Sequence[Case],
    gate: Gate,
    stage: str,
    keep: OnFailure,
) -> list[ParityRecord]:
    records: list[ParityRecord] = []
    for dims, group in _by_dims(component, cases):
        free_memory()  # what tracing, or the run before, has left: the next network may need it all
        session = backend.load(component, Profile(dims, precision))
        try:
            for case in group:
                results = session(case.feeds)
                verdicts = [
                    _verdict(component, graph, backend, precision, case, name, results, gate, stage)
                    for name in case.outputs
                ]
                records += [v.record for v in verdicts]
                for v in verdicts:
                    if not v.passed:
                        folder = keep(component, case, results, backend, precision)
                        raise _failure(v, folder)
        finally:
            session.close()
    free_memory()
    return records


def _verdict(
    component: Component,
    graph: str,
    backend: Backend,
    precision: Precision,
    case: Case,
    output: str,
    results: Mapping[str, Array],
    gate: Gate,
    stage: str,
) -> Verdict:
    reference = case.outputs[output]
    found = distance(reference, results[output])
    record = ParityRecord(
        component=component.spec.name,
        graph=graph,
        runtime=backend.name,
        precision=precision,
        case=f"{case.name} ({stage})" if stage else case.name,
        output=output,
        max_abs=found.max_abs,
        psnr_db=None if np.isinf(found.psnr_db) else round(found.psnr_db, 2),
        gate=str(gate),
    )
    return Verdict(record, meets(gate, found, reference), found.fault)


def _failure(verdict: Verdict, folder: Path) -> ParityFailure:
    r = verdict.record
    what = verdict.fault if verdict.fault else f"max abs {r.max_abs:.3g}, PSNR {r.psnr_db} dB"
    who = r.component if r.graph == "full" else f"{r.component}/{r.graph}"
    other = "" if r.precision == "f32" else "; `--precision f32` exports without " + r.precision
    return ParityFailure(
        f"{who} on {r.runtime} in {r.precision}, case {r.case}, output {r.output}: {what}; "
        f"required: {r.gate}. Nothing was saved",
        hint=f"repeat it with `python -m sdengine.export.repro {folder}`; that folder holds the "
        f"inputs, both outputs and the graph{other}",
    )


def _by_dims(
    component: Component, cases: Iterable[Case]
) -> list[tuple[dict[str, int], list[Case]]]:
    """Cases of one shape share a session."""
    groups: dict[tuple[tuple[str, int], ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case.dims(component.spec).items()), []).append(case)
    return [(dict(dims), group) for dims, group in groups.items()]
