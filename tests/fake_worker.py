"""A worker of bench's line protocol with known answers: `python fake_worker.py [FAULT]`.

FAULT   refuse      every run fails, with a hint
        die         the process ends at the first run, with last words
        kill        the process kills itself at the first run
        hang        the first run never answers
        noisy       prints on stdout, as libraries do
A run takes no time and says that it took options["seconds"]; its picture is grey, a little lighter
for each precision but f32.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np

from sdengine.bench.peers import protocol

ABLE = {"ok": True, "reason": "it can", "mend": "", "precisions": ["bf16", "f32"]}
GONE = {"ok": False, "reason": "its package is not installed", "mend": "pip install it"}
MODEL = {
    "path": "/nowhere",
    "name": "fake",
    "variant": "base",
    "native_size": [64, 64],
    "bundle": "0" * 16,
    "sha256": "1" * 64,
    "bytes": 1000,
    "graphs": {},
}


class Refused(Exception):
    hint = "do something else"


class FakeWorker:
    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.options: dict[str, Any] = {}

    def plan(self, model: str, backends: list[str]) -> dict[str, Any]:
        return {"model": MODEL, "backends": {b: GONE if b == "gone" else ABLE for b in backends}}

    def rate(self, precision: str, threads: int | None) -> dict[str, Any]:
        if precision == "bf16":
            raise Refused("no bf16 here")
        facts = {"threads": 1, "ran_in": precision, "side": 8, "calls": 1, "engine": "fake"}
        return {"rate": {"precision": precision, "flops": 1e9, **facts}}

    def load(self, options: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.options = options
        if self.fault == "noisy":
            sys.stdout.write("a library says hello\n")
            os.write(1, b"and so does its C++ part\n")
        about = {"backend": "fake", "precision": options.get("precision", "f32")}
        return {
            "interpreter_s": 0.1,
            "import_s": 0.2,
            "load_s": 0.3,
            "seconds": 0.3,
            "about": about,
        }

    def run(self, request: dict[str, Any], picture: str | None = None) -> dict[str, Any]:
        if self.fault == "refuse":
            raise Refused("not this one")
        if self.fault == "die":
            sys.stderr.write("these are my last words\n")
            sys.exit(3)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            time.sleep(60)
        grey = 100 if self.options.get("precision", "f32") == "f32" else 105
        protocol.keep_picture(picture, np.full((16, 16, 3), grey, np.uint8))
        seconds = float(self.options.get("seconds", 2.0))
        steps = request.get("steps", 2)
        stages = {"load_s": 0.5, "text_s": 0.1, "denoise_s": 1.0, "decode_s": 0.4, "own_s": 0.01}
        call = {"component": "unet", "dims": {"B": 2}}
        opened = {**call, "what": "open", "seconds": [9.0]}
        calls = [{**call, "what": "run", "seconds": [0.5] * steps}, opened]
        return {
            "seconds": seconds,
            "rows": [0.5] * steps,
            "first_step_at": 1.5,
            "done_at": 3.0,
            "stages": {**stages, "total_s": seconds},
            "calls": calls,
            "warnings": [],
        }


if __name__ == "__main__":
    worker = FakeWorker(sys.argv[1] if len(sys.argv) > 1 else "")
    protocol.serve(
        {"plan": worker.plan, "load": worker.load, "run": worker.run, "rate": worker.rate}
    )
