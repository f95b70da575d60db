"""Bundles for a GPU visit, judged in float32 by torch alone: time there is short.

python -m sdengine.bench.gpu_models whole CHECKPOINT OUT    the full-size model: no cuts or tiles
python -m sdengine.bench.gpu_models tiny CHECKPOINT OUT     of the tests of the contract
python -m sdengine.bench.gpu_models typed BUNDLE            float16 graphs into it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    from ..export import add_nvidia, export_bundle, open_checkpoint

    kind, source, *out = arguments
    if kind == "typed":
        add_nvidia(Path(source), ["trt"], ["f16"])
        return 0
    export_bundle(
        open_checkpoint(Path(source), prediction="eps"), Path(out[0]), targets=["torch"],
        precisions=["f32"], cuts=(), tiles=False,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
