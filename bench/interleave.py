"""Ours and a peer in turn, in one run: A B A B, so that what slows the machine slows both.

All variants of ours and one peer are alive at a time; the one that is not measured is stopped, so
that no thread of it spins. A ratio is the median of each round's own ratio, with its spread: how
many times as long the peer takes. The pictures of both are compared with our float32 picture of
the same seed; peers that draw other noise, or whose sampler differs, are far from it by nature.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import BackendError, SdengineError
from . import env, quality, results, stats
from .peers import catalogue
from .peers.catalogue import Peer
from .peers.client import Worker
from .results import Results
from .run import failure
from .suite import Report


@dataclass(frozen=True)
class Setup:
    """bundle      our model
    home        the folder with the peers' environments and models
    ours, peers names of catalogue.OURS and catalogue.PEERS
    threads     for all of them; None: each its own choice
    """

    bundle: str
    home: Path
    ours: Mapping[str, Peer]
    peers: Mapping[str, Peer]
    threads: int | None = None


@dataclass
class Runner:
    """A worker that was loaded, and what it said."""

    worker: Worker
    loaded: Mapping[str, Any]
    request: Mapping[str, Any]
    runs: list[dict[str, Any]]
    pixels: Any = None

    def once(self, keep: Path | None = None) -> dict[str, Any]:
        self.worker.resume()
        try:
            picture = None if keep is None else str(keep)
            return self.worker.ask("run", request=dict(self.request), picture=picture)
        finally:
            self.worker.pause()


def run(
    setup: Setup,
    request: Mapping[str, Any],
    out: Path,
    report: Report,
    *,
    rounds: int = 5,
    warmups: int = 1,
) -> Results:
    """`ratios` of the results: one entry for each peer and variant; `out` is valid after each peer.

    request     of all of them: prompt, seed, sampler, steps, guidance, width, height
    raises      StorageError; what fails otherwise is an entry with its reason
    """
    found = Results(env.conditions(), notes=[_describe(request, rounds)])
    results.save(found, out)
    reference = _reference(setup, request, found)
    for index, (name, peer) in enumerate(setup.peers.items()):
        report(name, index, len(setup.peers))
        found.ratios += _against(name, peer, setup, request, rounds, warmups, reference)
        results.save(found, out)
    found.complete = True
    results.save(found, out)
    return found


def _describe(request: Mapping[str, Any], rounds: int) -> str:
    fields = ", ".join(f"{k} {v}" for k, v in request.items())
    return f"{rounds} rounds in turn; {fields}"


def _reference(setup: Setup, request: Mapping[str, Any], found: Results) -> Any:
    """Our float32 picture, or None and a note."""
    standard = catalogue.OURS["f32"]
    try:
        with ExitStack() as stack:
            return _start(stack, standard, setup, request, 1).pixels
    except SdengineError as error:
        found.notes.append(f"no float32 reference: {error.message}")
        return None


def _against(
    name: str,
    peer: Peer,
    setup: Setup,
    request: Mapping[str, Any],
    rounds: int,
    warmups: int,
    reference: Any,
) -> list[dict[str, Any]]:
    """One peer's entries. All alive workers end when this does, whatever happens."""
    failed: dict[str, dict[str, str]] = {}
    runners: dict[str, Runner] = {}
    everyone = {name: peer, **{f"sdengine {n}": o for n, o in setup.ours.items()}}
    with ExitStack() as stack:
        for who, what in everyone.items():
            if name in failed:
                break
            try:
                runners[who] = _start(stack, what, setup, request, warmups)
            except SdengineError as error:
                failed[who] = failure("load", error.message, error.hint)
        for _ in range(rounds if name in runners and len(runners) > 1 else 0):
            for who, runner in list(runners.items()):
                if who in failed:
                    continue
                try:
                    runner.runs.append(runner.once())
                except SdengineError as error:
                    failed[who] = failure("run", error.message, error.hint)
            if name in failed:
                break
    entries = []
    for who in list(everyone)[1:]:
        entry = {"peer": name, "ours": who, "settings": peer.settings, "ok": False}
        entry["our_settings"] = everyone[who].settings
        trouble = failed.get(name, failed.get(who))
        if trouble is None:
            entry |= {"ok": True, **_figures(runners[name], runners[who], reference)}
        else:
            entry["failure"] = trouble
        entries.append(entry)
    return entries


def _start(
    stack: ExitStack, peer: Peer, setup: Setup, request: Mapping[str, Any], warmups: int
) -> Runner:
    """Load and warm up. Raises BackendError."""
    command = catalogue.command(peer, setup.home)
    options = catalogue.options(peer, setup.home, setup.bundle)
    options |= {} if setup.threads is None else {"threads": setup.threads}
    asked = {**request, **peer.request}
    environment = dict(peer.env)
    if peer.worker is None:
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    worker = stack.enter_context(Worker(command, environment))
    loaded = worker.ask("load", options=options, request=asked, spawned=worker.spawned)
    runner = Runner(worker, loaded, asked, [])
    with tempfile.TemporaryDirectory(prefix="sdengine-bench-") as scratch:
        kept = Path(scratch) / "picture.npy"
        for _ in range(warmups):
            runner.once(kept)
        runner.pixels = np.load(kept) if kept.exists() else None
    return runner


def _figures(peer: Runner, ours: Runner, reference: Any) -> dict[str, Any]:
    both = {"peer": peer, "ours": ours}
    seconds = {who: [r["seconds"] for r in runner.runs] for who, runner in both.items()}
    if min(map(len, seconds.values())) == 0:
        raise BackendError("no round was measured", hint="give --rounds 2 or more")
    return {
        "seconds": {who: stats.summary(samples) for who, samples in seconds.items()},
        "ratio": stats.paired_ratio(seconds["ours"], seconds["peer"]).to_dict(),
        "step_s": {
            who: stats.summary([t for r in runner.runs for t in r.get("rows", [])])
            for who, runner in both.items()
        },
        "load_s": {who: runner.loaded["seconds"] for who, runner in both.items()},
        "peak_bytes": {who: runner.runs[-1]["peak_bytes"] for who, runner in both.items()},
        "about": {who: runner.loaded.get("about", {}) for who, runner in both.items()},
        "quality": {who: _judge(runner.pixels, reference) for who, runner in both.items()},
    }


def _judge(pixels: Any, reference: Any) -> dict[str, Any] | None:
    if pixels is None or reference is None or pixels.shape != reference.shape:
        return None
    return quality.compare(pixels, reference).to_dict()


def setup(
    bundle: str, home: Path, ours: Sequence[str], peers: Sequence[str], threads: int | None
) -> Setup:
    """By names. Raises UnknownName."""
    return Setup(
        bundle,
        home,
        catalogue.find(ours, catalogue.OURS, "variant of ours"),
        catalogue.find(peers, catalogue.PEERS, "peer"),
        threads,
    )
