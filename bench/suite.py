"""A whole run of the benchmark: plan, references, rows, limits; saved after every step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..engine.errors import SdengineError
from . import cases, env, limits, results, run
from .cases import Case, Wish
from .peers.client import Worker
from .results import Results, Row

Report = Callable[[str, int, int], None]
REFERENCE_BACKEND = "openvino"


def bench(
    wish: Wish,
    out: Path,
    report: Report,
    *,
    reference: str = REFERENCE_BACKEND,
    warm_start: bool = True,
    command: Sequence[str] = run.OWN,
) -> Results:
    """Measure a wish; `out` is valid after every row, also after Ctrl-C.

    reference   backend whose float32 pictures the others are compared with
    report      called with (what is done now, how many are done, how many there are)
    raises      BackendError, BundleError (the model cannot be opened), StorageError
    """
    with Worker(command) as worker:
        backends = list(dict.fromkeys((*wish.backends, reference)))
        plan = worker.ask("plan", model=wish.model, backends=backends)
    rows = list(cases.rows(wish, plan["backends"]))
    return measure(rows, out, report, plan, reference=reference, warm_start=warm_start,
                   command=command)  # fmt: skip


def measure(
    rows: Sequence[Case],
    out: Path,
    report: Report,
    plan: dict[str, Any],
    *,
    reference: str = REFERENCE_BACKEND,
    warm_start: bool = True,
    command: Sequence[str] = run.OWN,
) -> Results:
    """Measure these rows and the references that they need."""
    ordered, references = with_references(rows, reference)
    found = Results(env.conditions(), model=plan["model"])
    results.save(found, out)
    with tempfile.TemporaryDirectory(prefix="sdengine-bench-") as scratch:
        folders = {case.name: Path(scratch) / str(i) for i, case in enumerate(ordered)}
        add_rates(found, ordered, command)
        for index, case in enumerate(ordered):
            report(case.name, index, len(ordered))
            row = run.measure(case, folders[case.name], command=command, warm_start=warm_start)
            name = references[case.name]
            judged = row if name == case.name else found.row(name)
            assert judged is not None, f"{name} comes before {case.name}"
            run.judge(row, judged, folders[case.name], folders[name])
            finish(row, found)
            found.rows.append(row)
            results.save(found, out)
        report("the machine's rate", len(ordered), len(ordered))
        add_rates(found, ordered, command)  # once more: the better of both is the machine's
    for row in found.rows:
        limits.attach(row, found)
    asked = {case.name: index for index, case in enumerate(rows)}
    found.rows.sort(key=lambda row: asked.get(row["name"], -1))
    found.complete = True
    results.save(found, out)
    return found


def finish(row: Row, found: Results) -> None:
    """What the parent knows and the worker does not."""
    if row["ok"]:
        row["disk"]["bundle_bytes"] = found.model["bytes"]
        limits.attach(row, found)


def with_references(rows: Sequence[Case], backend: str) -> tuple[list[Case], dict[str, str]]:
    """The rows with each one's reference before it, and the reference's name by row's name."""
    ordered: dict[str, Case] = {}
    references: dict[str, str] = {}
    taken = {case.name for case in rows}
    for case in rows:
        standard = cases.reference(case, backend)
        same = next((c for c in (*rows, *ordered.values()) if _alike(c, standard)), None)
        if same is None:
            same = replace(standard, name=_free(standard.name, taken))
            taken.add(same.name)
        references[case.name] = references[same.name] = same.name
        ordered.setdefault(same.name, same)
    for case in rows:
        ordered.setdefault(case.name, case)
    return list(ordered.values()), references


def _free(name: str, taken: Collection[str]) -> str:
    """Two rows may need references that differ in more than their names tell."""
    names = chain([name], (f"{name}-{n}" for n in count(2)))
    return next(candidate for candidate in names if candidate not in taken)


def _alike(a: Case, b: Case) -> bool:
    return (dict(a.request), dict(a.load), a.prompts) == (dict(b.request), dict(b.load), b.prompts)


def add_rates(found: Results, rows: Iterable[Case], command: Sequence[str]) -> None:
    """Measure the rate for each precision and number of threads that the rows use, in a process of
    its own; where it cannot be had, a note says why."""
    wanted = {
        (case.load["precision"], case.load.get("threads"))
        for case in rows
        if not case.refused and case.load.get("precision") is not None
    }
    for precision, threads in sorted(wanted, key=str):
        try:
            with Worker(command) as worker:
                rate = worker.ask("rate", precision=precision, threads=threads)["rate"]
            found.rates.append({**rate, "asked": threads})
        except SdengineError as error:
            note = f"no rate in {precision}: {error.message}"
            found.notes += [] if note in found.notes else [note]
