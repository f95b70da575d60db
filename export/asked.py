"""What the command line asks of NVIDIA's engines, as text: checked and turned into numbers.

checked by  tests/unit/test_export_shapes.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..backends.plans import RTX, TRT
from ..engine.errors import RequestError
from .shapes import Ask, Shapes

TARGETS = (TRT, RTX)
_SIZE = re.compile(r"(\d+)[xX](\d+)")


def nvidia_ask(
    targets: Sequence[str],
    sm: str | None = None,
    shapes: str | None = None,
    batch: str | None = None,
    halves: str | None = None,
    dynamic: bool = False,
    jobs: int | None = None,
) -> tuple[list[str], Ask]:
    """Those of the targets that are NVIDIA's, and what they ask for.

    sm, batch, halves    numbers with commas between
    shapes               512x512,768x768: width x height
    raises      RequestError: not a number; an option that no target here has
    """
    chosen = [t for t in targets if t in TARGETS]
    given = {"--sm": sm, "--shapes": shapes, "--batch": batch, "--halves": halves, "--jobs": jobs}
    named = [n for n, v in given.items() if v is not None] + (["--dynamic"] if dynamic else [])
    if named and not chosen:
        raise RequestError(
            f"{', '.join(named)}: for engines of NVIDIA, and none was asked for",
            hint="name the target: --target trt-rtx --sm 86,89,120",
        )
    if jobs is not None and jobs < 1:
        raise RequestError(f"--jobs {jobs}: one build at a time at least", hint="--jobs 1")
    wanted = Shapes(
        tuple(_size(text) for text in shapes.split(",")) if shapes is not None else (),
        _numbers("--batch", batch) if batch is not None else (1,),
        _numbers("--halves", halves) if halves is not None else (2,),
        dynamic,
    )
    if wrong := [n for n in wanted.halves if n not in (1, 2)]:
        raise RequestError(
            f"--halves {wrong[0]}: guidance has two halves",
            hint="2 for both in one call, 1 for one alone, 2,1 for an engine of each",
        )
    return chosen, Ask(() if sm is None else _numbers("--sm", sm), wanted, jobs)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise RequestError(
            f"{option} {text}: {wrong[0]!r} is not a whole number",
            hint=f"whole numbers with commas between: {option} "
            + ("86,89,120" if option == "--sm" else "1,2"),
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise RequestError(
            f"--shapes: {text!r} is not a size", hint="width x height: --shapes 512x512,768x768"
        )
    return int(found[2]), int(found[1])
