"""Ours and the peers in turn, in one run: A B A C A, so that what slows the machine slows all.

All variants of ours stay alive, and one peer at a time; who is not measured is stopped, so that no
thread of it spins. Slow peers may take fewer turns than fast ones, or fewer steps a picture, and
ours need not run between any two turns of peers: pace.py has the plan. A ratio sets each turn of a
peer against our turns just before and just after it, with its spread: how many times as long the
peer takes. The pictures of both are compared with our float32 picture of the same seed; peers that
draw other noise, or whose sampler differs, are far from it by nature.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import BackendError, SdengineError
from . import env, pace, quality, reference, results, stats
from .pace import Pace
from .peers import catalogue
from .peers.catalogue import Peer
from .peers.client import TIMEOUT, Worker
from .results import Results
from .run import OWN, failure
from .suite import Report


@dataclass(frozen=True)
class Setup:
    """bundle      our model
    home        the folder with the peers' environments and models
    ours, peers names of catalogue.OURS and catalogue.PEERS
    threads     for all of them; None: each its own choice
    limit       seconds that one answer of a worker may take
    """

    bundle: str
    home: Path
    ours: Mapping[str, Peer]
    peers: Mapping[str, Peer]
    threads: int | None = None
    limit: float = TIMEOUT


@dataclass
class Runner:
    """A worker that was loaded, and what it said.

    runs    by the turn in which they were, each with the `seconds` of a whole picture
    """

    worker: Worker
    loaded: Mapping[str, Any]
    request: Mapping[str, Any]
    missing: int = 0
    limit: float = TIMEOUT
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    pixels: Any = None

    def once(self, turn: int) -> None:
        """Measure a picture; the first one is kept, if none of its steps is missing."""
        with tempfile.TemporaryDirectory(prefix="sdengine-bench-") as scratch:
            kept = Path(scratch) / "picture.npy"
            wanted = self.pixels is None and not self.missing
            found = self.ask(self.request, kept if wanted else None)
            if wanted and kept.exists():
                self.pixels = np.load(kept)
        self.runs[turn] = pace.composed(found, self.missing)

    def ask(self, request: Mapping[str, Any], keep: Path | None = None) -> dict[str, Any]:
        self.worker.resume()
        try:
            picture = None if keep is None else str(keep)
            return self.worker.ask("run", self.limit, request=dict(request), picture=picture)
        finally:
            self.worker.pause()


def run(
    setup: Setup,
    request: Mapping[str, Any],
    out: Path,
    report: Report,
    paced: Pace,
    *,
    keep: Path | None = None,
    rates: Sequence[str] = (),
) -> Results:
    """`ratios` of the results: one entry for each peer and variant; `out` is valid after each peer.

    request     of all of them: prompt, seed, sampler, steps, guidance, width, height
    keep        see reference.picture
    rates       precisions whose rate of matrix products is measured at the end
    raises      StorageError; what fails otherwise is an entry with its reason
    """
    found = Results(env.conditions(), reference.model_of(setup.bundle))
    found.notes.append(_describe(request, paced))
    results.save(found, out)
    standard = reference.picture(
        keep, found.model, request, lambda: _standard(setup, request), found.notes
    )
    counts = {name: paced.turns_of(name) for name in setup.peers}
    places = {name: paced.places(name, sum(counts.values()) + 1) for name in setup.ours}
    with ExitStack() as stack:
        ours, failed = _ours(stack, setup, request, paced)
        done = 0  # turns of peers
        for index, (name, peer) in enumerate(setup.peers.items()):
            report(name, index, len(setup.peers))
            with ExitStack() as inner:
                runner, trouble = _try_start(inner, name, peer, setup, request, paced)
                for _ in range(counts[name] if runner is not None and trouble is None else 0):
                    _our_turn(ours, failed, places, done)
                    trouble = _try_turn(runner, done)
                    done += 1
                    if trouble is not None:
                        break
                if runner is not None:
                    _our_turn(ours, failed, places, done)
                found.ratios += _entries(name, peer, runner, trouble, setup, ours, failed, standard)
            results.save(found, out)
    if any(entry["ok"] for entry in found.ratios):
        _add_rates(found, rates, setup.threads)
    found.complete = True
    results.save(found, out)
    return found


def _describe(request: Mapping[str, Any], paced: Pace) -> str:
    fields = ", ".join(f"{k} {v}" for k, v in request.items())
    return f"{paced}; {fields}"


def _standard(setup: Setup, request: Mapping[str, Any]) -> Any:
    """Our float32 picture. Raises SdengineError."""
    with ExitStack() as stack:
        runner = _start(stack, catalogue.OURS["f32"], setup, request)
        runner.once(0)
        return runner.pixels


def _ours(
    stack: ExitStack, setup: Setup, request: Mapping[str, Any], paced: Pace
) -> tuple[dict[str, Runner], dict[str, dict[str, str]]]:
    """All our variants, loaded; and why some are not."""
    ours: dict[str, Runner] = {}
    failed: dict[str, dict[str, str]] = {}
    for name, peer in setup.ours.items():
        runner, trouble = _try_start(stack, name, peer, setup, request, paced)
        if trouble is not None:
            failed[name] = trouble
        elif runner is not None:
            ours[name] = runner
    return ours, failed


def _our_turn(
    ours: Mapping[str, Runner],
    failed: dict[str, dict[str, str]],
    places: Mapping[str, frozenset[int]],
    turn: int,
) -> None:
    """Between two turns of peers: those of ours whose plan has it, once."""
    for name, runner in ours.items():
        if turn in places[name] and turn not in runner.runs and name not in failed:
            trouble = _try_turn(runner, turn)
            if trouble is not None:
                failed[name] = trouble


def _try_turn(runner: Runner | None, turn: int) -> dict[str, str] | None:
    assert runner is not None, "a turn of one that was not started"
    try:
        runner.once(turn)
    except SdengineError as error:
        return failure("run", error.message, error.hint)
    return None


def _try_start(
    stack: ExitStack,
    name: str,
    peer: Peer,
    setup: Setup,
    request: Mapping[str, Any],
    paced: Pace,
) -> tuple[Runner | None, dict[str, str] | None]:
    """Load and warm up; or why not."""
    steps = {"steps": paced.steps[name]} if name in paced.steps else {}
    try:
        runner = _start(stack, peer, setup, {**request, **peer.request, **steps})
    except SdengineError as error:
        return None, failure("load", error.message, error.hint)
    runner.missing = request["steps"] - paced.steps[name] if name in paced.steps else 0
    warm = {} if paced.warm_steps is None else {"steps": paced.warm_steps}
    try:
        for _ in range(paced.warmups_of(name)):
            runner.ask({**runner.request, **warm})
    except SdengineError as error:
        return runner, failure("run", error.message, error.hint)
    return runner, None


def _start(stack: ExitStack, peer: Peer, setup: Setup, request: Mapping[str, Any]) -> Runner:
    """Raises BackendError."""
    command = catalogue.command(peer, setup.home)
    options = catalogue.options(peer, setup.home, setup.bundle)
    options |= {} if setup.threads is None else {"threads": setup.threads}
    environment = dict(peer.env)
    if peer.worker is None:
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    worker = stack.enter_context(Worker(command, environment))
    loaded = worker.ask(
        "load", setup.limit, options=options, request=dict(request), spawned=worker.spawned
    )
    worker.pause()
    return Runner(worker, loaded, request, limit=setup.limit)


def _entries(
    name: str,
    peer: Peer,
    runner: Runner | None,
    trouble: dict[str, str] | None,
    setup: Setup,
    ours: Mapping[str, Runner],
    failed: Mapping[str, dict[str, str]],
    standard: Any,
) -> list[dict[str, Any]]:
    """One peer against each variant of ours."""
    entries = []
    for variant, own in setup.ours.items():
        entry = {"peer": name, "ours": f"sdengine {variant}", "settings": peer.settings}
        entry |= {"our_settings": own.settings, "ok": False}
        why = trouble if trouble is not None else failed.get(variant)
        if why is None:
            assert runner is not None, "no trouble, and no runner"
            entry |= {"ok": True, **_figures(runner, ours[variant], standard)}
        else:
            entry["failure"] = why
        entries.append(entry)
    return entries


def _figures(peer: Runner, ours: Runner, standard: Any) -> dict[str, Any]:
    both = {"peer": peer, "ours": ours}
    near = pace.neighbours(sorted(peer.runs), sorted(ours.runs))
    if not near:
        raise BackendError("no round was measured", hint="give --rounds 1 or more")
    times = [(ours.runs[b]["seconds"], peer.runs[a]["seconds"]) for a, b in near]
    used = {"peer": sorted(peer.runs), "ours": sorted({b for _, b in near})}
    runs = {who: [runner.runs[t] for t in used[who]] for who, runner in both.items()}
    found = {
        "seconds": {who: stats.summary([r["seconds"] for r in runs[who]]) for who in both},
        "ratio": stats.paired_ratio(*zip(*times, strict=True)).to_dict(),
        "step_s": {
            who: stats.summary([t for r in runs[who] for t in r.get("rows", [])]) for who in both
        },
        "load_s": {who: runner.loaded["seconds"] for who, runner in both.items()},
        "peak_bytes": {who: runs[who][-1]["peak_bytes"] for who in both},
        "about": {who: runner.loaded.get("about", {}) for who, runner in both.items()},
        "quality": {who: _judge(runner.pixels, standard) for who, runner in both.items()},
    }
    if peer.missing:
        found["composed_of"] = peer.request["steps"]
    return found


def _judge(pixels: Any, standard: Any) -> dict[str, Any] | None:
    if pixels is None or standard is None or pixels.shape != standard.shape:
        return None
    return quality.compare(pixels, standard).to_dict()


def _add_rates(found: Results, precisions: Sequence[str], threads: int | None) -> None:
    """The machine's rates of matrix products, each in a process of its own."""
    for precision in precisions:
        try:
            with Worker(OWN) as worker:
                rate = worker.ask("rate", precision=precision, threads=threads)["rate"]
            found.rates.append({**rate, "asked": threads})
        except BackendError as error:
            found.notes.append(f"no rate in {precision}: {error.message}")


def setup(
    bundle: str,
    home: Path,
    ours: Sequence[str],
    peers: Sequence[str],
    threads: int | None,
    limit: float = TIMEOUT,
) -> Setup:
    """By names. Raises UnknownName."""
    return Setup(
        bundle,
        home,
        catalogue.find(ours, catalogue.OURS, "variant of ours"),
        catalogue.find(peers, catalogue.PEERS, "peer"),
        threads,
        limit,
    )
