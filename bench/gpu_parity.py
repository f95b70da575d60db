"""Parity of one backend on the machine that it is for: `python -m sdengine.bench.gpu_parity NAME`.

The embedded model's networks on recorded inputs against torch in float32 on the processor, in
float32 and float16. One line of JSON: precision -> component -> its worst PSNR in dB, and `ok`.

checked by  tests/unit/test_gpu_visit.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import SdengineError
from ..engine.ports import Backend
from ..engine.spec import Component, Precision

EMBEDDED = Path(__file__).parents[1] / "models" / "emoji"
TRIED: tuple[Precision, ...] = ("f32", "f16")


def measure(backend: Backend, rehearse: bool = False) -> dict[str, Any]:
    """Equal outputs are 999 dB. What a network meets is said in the place of its figure."""
    from ..engine.bundle import open_bundle
    from ..engine.tokenizer import Tokenizer
    from ..export.checkpoint import open_checkpoint
    from ..export.components import parts
    from ..export.parity import GATES, Gate, judge
    from ..export.record import PROMPTS, record

    able = [p for p in TRIED if p in backend.probe().precisions]
    found: dict[str, Any] = {"ok": True}
    with tempfile.TemporaryDirectory(prefix="sdengine-") as scratch:
        folder = Path(scratch) / "emoji"
        shutil.copytree(EMBEDDED, folder)
        bundle = open_bundle(folder)
        tokenizer = Tokenizer(bundle.tokenizer_file, bundle.facts.tokenizer)
        ids = np.array([tokenizer.encode(p).ids for p in PROMPTS], np.int64)
        described = parts(bundle.facts, open_checkpoint(folder).configs, ())
        weights = {n: c.weights for n, c in bundle.components.items()}
        cases = record(described, weights, bundle.facts, ids, lambda text, share: None)
        for precision in able:
            figures: dict[str, float | str] = {}
            for name, component in bundle.components.items():
                network = _whole(component, folder)
                try:
                    records = judge(
                        network, backend, precision, cases[name][: 1 if rehearse else None],
                        Gate(-np.inf), keep=lambda *_: folder,
                    )  # fmt: skip
                except SdengineError as error:
                    figures[name], found["ok"] = error.message, False
                    continue
                worst = min(999.0 if r.psnr_db is None else r.psnr_db for r in records)
                figures[name] = worst
                found["ok"] = found["ok"] and worst >= GATES[precision].psnr_db
            found[precision] = figures
    return found


def _whole(component: Component, folder: Path) -> Component:
    """Of its graphs, what every run needs; with the typed ones that TensorRT takes."""
    from ..export.typed import write_typed

    graphs = {n: g for n, g in component.graphs.items() if n in ("prologue", "full")}
    own = replace(component, graphs=graphs)
    return replace(own, typed={"f16": write_typed(own, folder, folder, "f16").component})


def main(name: str, rehearse: bool) -> int:
    from .gpu_row import backend_of

    sys.stdout.write("\n" + json.dumps(measure(backend_of(name, rehearse), rehearse)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--rehearse" in sys.argv))
