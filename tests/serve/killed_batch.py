"""Starts one batch again and again, kills it (SIGKILL), and looks at what is there after each.

One process imports everything, and forks the batches: a start then takes no time, and many moments
are tried. `killed_batch.py BUNDLE LINES OUT KILLS SEED`; prints one JSON object.

KILLS random moments; then before each call that changes the disk, one after the other: those lie
too close together for chance to hit between two of them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdengine import api
from sdengine.engine.bundle import open_bundle
from sdengine.engine.pipeline import Pipeline
from sdengine.serve import batch, durable, lines, plan

Start = Callable[[Path], None]


def forked(start: Start, out: Path, after: float | None = None, call: int | None = None) -> bool:
    """Whether it came to its end; killed after so many seconds, or before that call."""
    child = os.fork()
    if child == 0:
        if call is not None:
            die_before(call)
        try:
            start(out)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"a batch ended with status {status}"
    return status == 0


def die_before(call: int) -> None:
    """This process ends at its `call`-th call, from 0, that changes the disk: in the middle of one
    that writes, before any other."""
    calls = itertools.count()

    def is_due() -> bool:
        return next(calls) == call

    def deadly(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            if is_due():
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        return outer

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            if is_due():
                super().write(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    pwrite = os.pwrite

    def torn_pwrite(file: int, data: bytes, at: int) -> int:
        if is_due():
            pwrite(file, data[: len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(file, data, at)

    for name in ("open", "fsync", "replace", "ftruncate", "close"):
        setattr(os, name, deadly(getattr(os, name)))
    os.pwrite = torn_pwrite
    durable.open = lambda file, mode, **how: Torn(file, mode.replace("b", ""), **how)  # type: ignore[attr-defined]


def half(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
            return image.size != (128, 64) or "sdengine" not in image.info
    except OSError:
        return True


class Watch:
    """What may not be, counted."""

    def __init__(self, start: Start, reference: dict[str, bytes]) -> None:
        self.start, self.reference = start, reference
        self.facts = dict.fromkeys(("half", "again", "lost", "interrupted", "rounds"), 0)

    def kill(self, folder: Path, **moment: Any) -> bool:
        before = {p.name: p.stat().st_ino for p in folder.glob("*.png")}
        ended = forked(self.start, folder, **moment)
        after = {p.name: p.stat().st_ino for p in folder.glob("*.png")}
        self.facts["half"] += sum(half(folder / name) for name in after.keys() - before.keys())
        self.facts["again"] += sum(after.get(name) != inode for name, inode in before.items())
        self.facts["interrupted"] += not ended and len(after) < len(self.reference)
        return ended or len(after) == len(self.reference)

    def finish(self, folder: Path) -> None:
        """Let it come to its end, and compare with a batch that was never killed."""
        self.kill(folder)
        found = {p.name: p.read_bytes() for p in folder.glob("*.png")}
        text = (folder / "results.jsonl").read_text()
        rows = [json.loads(line)["picture"] for line in text.splitlines()]
        self.facts["half"] += sum(found[name] != self.reference.get(name) for name in found)
        self.facts["half"] += len(list(folder.rglob("*.part")))
        self.facts["again"] += len(rows) - len(set(rows))
        self.facts["lost"] += len(self.reference.keys() ^ found.keys())
        self.facts["lost"] += len(self.reference.keys() ^ set(rows))
        self.facts["rounds"] += 1


def started(pipe: Pipeline, wanted: list[plan.Item]) -> Start:
    def start(out: Path) -> None:
        batch.run(wanted, out, batch.Local(lambda preset: nullcontext(pipe)))

    return start


def whole(start: Start, out: Path) -> tuple[dict[str, bytes], float]:
    """Pictures and seconds of a batch that nobody kills."""
    begin = time.perf_counter()
    forked(start, out)
    took = time.perf_counter() - begin
    return {p.name: p.read_bytes() for p in out.glob("*.png")}, took


def main() -> None:
    bundle, requests, out = map(Path, sys.argv[1:4])
    kills, random = int(sys.argv[4]), np.random.default_rng(int(sys.argv[5]))
    wanted = plan.items(lines.read(requests).good, open_bundle(bundle).id, {})
    pipe = api.load(bundle, backend="fake")
    start = started(pipe, wanted)
    reference, span = whole(start, out)
    by_chance = Watch(start, reference)
    for k in range(kills):
        folder = out.with_name(f"chance-{by_chance.facts['rounds']}")
        ended = by_chance.kill(folder, after=float(random.uniform(0, 0.8 * span)))
        if ended or k == kills - 1:
            by_chance.finish(folder)

    start = started(pipe, wanted[:3])
    by_call = Watch(start, whole(start, out.with_name("three"))[0])
    for call in itertools.count():
        folder = out.with_name(f"call-{call}")
        ended = forked(start, folder, call=call)
        by_call.facts["half"] += sum(half(path) for path in folder.glob("*.png"))
        by_call.finish(folder)
        if ended:
            break
    sys.stdout.write(json.dumps({"chance": by_chance.facts, "call": by_call.facts}))


main()
