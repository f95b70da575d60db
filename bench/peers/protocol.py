"""The worker's end of the line protocol: one JSON object a line, a question in, an answer out.

    {"op": "load", ...}   ->  {"ok": true, "seconds": 4.1, "peak_bytes": 5.6e9, ...}
    {"op": "run", ...}    ->  {"ok": true, "seconds": 27.6, "rows": [4.1, 4.2], ...}
    a failure             ->  {"ok": false, "error": "what happened", "hint": "what to do"}

The end of the input ends the worker. This file runs in environments that hold only a peer: it needs
Python 3.10 and nothing else, and imports nothing of sdengine.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[..., "dict[str, Any] | None"]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer questions until the input ends. The rest of a question are the handler's arguments."""
    # Libraries print on stdout: they get stderr, and the answers a file of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        answer = _answer(handlers, question.pop("op"), question)
        answers.write(json.dumps({**answer, "peak_bytes": peak_bytes()}) + "\n")
        answers.flush()


def _answer(handlers: Mapping[str, Handler], op: str, rest: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = handlers[op](**rest)
    except Exception as error:
        traceback.print_exc()
        hint = getattr(error, "hint", "the worker's stderr shows where it happened")
        return {"ok": False, "error": f"{type(error).__name__}: {error}", "hint": hint}
    # what a handler timed itself, without its own bookkeeping, stands
    return {"ok": True, "seconds": time.perf_counter() - start, **({} if found is None else found)}


def peak_bytes() -> int | None:
    """The most memory that this process held at once (resident; mapped files count while read).

    ru_maxrss would do on macOS; on Linux it may be the parent's, from before exec.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_picture(path: str | None, pixels: Any) -> None:
    """uint8 [H, W, 3] into a .npy file, for whoever measures quality; None: nobody asks."""
    if path is None:
        return
    import numpy as np

    np.save(path, np.ascontiguousarray(pixels, dtype=np.uint8))
