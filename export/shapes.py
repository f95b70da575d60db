"""The shapes that engines are built for ahead of time: sizes of pictures to sizes of tensors.

checked by  tests/unit/test_export_shapes.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..backends.plans import Span
from ..engine.bundle import Bundle
from ..engine.errors import RequestError
from ..engine.spec import Component, Graph, named_dims


@dataclass(frozen=True)
class Shapes:
    """What is asked for.

    sizes       (height, width) of pictures, in pixels; none: the model's own
    batches     pictures in one call of the UNet
    halves      of guidance in one call: 2, and 1 for models that need none, or rows without it
    dynamic     one engine from the least to the largest of all, best at the first, instead of one
                for each: smaller on disk, slower to run
    """

    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    halves: tuple[int, ...] = (2,)
    dynamic: bool = False


@dataclass(frozen=True)
class Ask:
    """What engines to build.

    sms         compute capabilities; none: typed graphs alone
    jobs        builds at once, where memory allows; None: as many as there are processors
    """

    sms: tuple[int, ...] = ()
    shapes: Shapes = field(default_factory=Shapes)
    jobs: int | None = None


def check(shapes: Shapes, bundle: Bundle) -> None:
    """Raises RequestError for a size that the model cannot have."""
    latent = bundle.facts.latent
    multiple = latent.factor * latent.multiple
    for height, width in shapes.sizes:
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise RequestError(
                f"an engine for {width}x{height}: sides are multiples of {multiple} pixels",
                hint=f"for instance --shapes {_near(width, multiple)}x{_near(height, multiple)}",
            )
    if wrong := [n for n in shapes.batches if n < 1]:
        raise RequestError(
            f"an engine for a batch of {wrong[0]}", hint="a batch has 1 picture or more: --batch 1"
        )


def profiles(
    shapes: Shapes, bundle: Bundle, component: Component, graph: Graph
) -> list[dict[str, Span]]:
    """The sizes of a graph's inputs, one entry for each engine to build."""
    names = named_dims(graph.inputs)
    wanted: list[dict[str, int]] = []
    for sizes in _dims(shapes, bundle, component):
        chosen = {n: sizes[n] for n in names}
        if chosen not in wanted:
            wanted.append(chosen)
    if not shapes.dynamic:
        return [{d: (n, n, n) for d, n in dims.items()} for dims in wanted]
    best = wanted[0]
    spans = {d: [dims[d] for dims in wanted] for d in names}
    return [{d: (min(n), best[d], max(n)) for d, n in spans.items()}]


def _dims(shapes: Shapes, bundle: Bundle, component: Component) -> Sequence[Mapping[str, int]]:
    """Sizes of all named dimensions that this component may have, in order of preference."""
    facts, name = bundle.facts, component.spec.name
    if name == "depth":
        side = 16 * int(component.config["grid"])
        return [{"B": 1, "H": side, "W": side}]
    if name == "text_encoder":
        return [{"B": halves} for halves in shapes.halves]
    sizes = shapes.sizes if shapes.sizes else (facts.native_size,)
    factor = facts.latent.factor
    calls = [(1, 1)] if name != "unet" else [(b, h) for b in shapes.batches for h in shapes.halves]
    return [
        {
            "B": batch * halves,
            "T": facts.tokenizer.length,
            "h": height // factor,
            "w": width // factor,
            "H": height,
            "W": width,
        }
        for height, width in sizes
        for batch, halves in calls
    ]


def _near(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
