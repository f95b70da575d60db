"""Engines of TensorRT and TensorRT-RTX: where they lie, what they are made of, which one fits.

On disk. A strongly typed graph stands beside the portable one, `unet/full.f16.onnx`; the manifest
lists it under `components.unet.typed.f16`, and the reader gives it as `component.typed["f16"]`, a
Component like any other: same spec, own graphs and weights file. TensorRT-RTX engines that were
built ahead of time are files of the bundle, one for each typed graph, shape and kind of GPU:

    targets/trt-rtx/sm89/unet/full.f16.B2-T77-h64-w64.engine

The manifest lists each in `targets.trt-rtx.engines`; the reader gives them as
`component.typed["f16"].engines`.

At run time a backend for these engines
1. takes `network = typed(component, precision)` in the place of `component.at(precision)`;
2. asks `find(network, graph, dims, sm, version)` for each graph that it opens: the engine for this
   GPU and library whose sizes hold the wanted ones, the one built for these very sizes first;
3. where that is a reason instead, builds one from `network.graphs[graph].path` with
   `plan_build.build` (TensorRT, or TensorRT-RTX on the machine with the GPU), and keeps it in
   backends/cache.py under `what(...)` and `made(...)`, to which it adds its driver.

checked by  tests/unit/test_backend_plans.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ..engine.errors import BackendUnavailable, MissingPart
from ..engine.spec import Component, Engine, Graph, Precision, named_dims

RTX = "trt-rtx"  # the target whose engines are portable, and lie in the bundle
TRT = "trt"  # the target that proves typed graphs; its engines are built where the GPU is
LIBRARIES = {RTX: "tensorrt_rtx", TRT: "tensorrt"}
# What the builder is told beside the graph.
RECIPE = "strongly typed, level 3, no weights stripped"
STRIPPED = "strongly typed, level 3, weights stripped, to be refitted with the same"

LEAST_SM: Mapping[Precision, int] = {"bf16": 80, "fp8": 89}  # what computes in it

Span = tuple[int, int, int]  # least, best, largest size


def check_precision(precision: Precision, sm: int) -> None:
    """Raises BackendUnavailable for a kind of GPU that does not compute in this precision."""
    least = LEAST_SM.get(precision, 0)
    if sm < least:
        raise BackendUnavailable(
            f"sm{sm} has no {precision}: it takes compute capability {least / 10:.1f} or more",
            hint=f"use float16 there: --precision f16; or build {precision} for newer GPUs alone:"
            f" --sm {least}",
        )


def typed(component: Component, precision: Precision) -> Component:
    """The strongly typed network of a component. Raises MissingPart where there is none."""
    if precision not in component.typed:
        here = ", ".join(component.typed)
        raise MissingPart(
            f"{component.spec.name} has no strongly typed graphs in {precision}"
            + (f"; it has them in {here}" if here else ""),
            hint=f"make them: sdengine export BUNDLE --target trt --precision {precision}",
        )
    return component.typed[precision]


def find(
    network: Component, graph: str, dims: Mapping[str, int], sm: int, version: str
) -> Engine | str:
    """The engine built ahead of time that fits, or why there is none.

    network     a typed network, as the bundle's reader gives it
    dims        what will be fed; a name that is absent may take any size
    sm          compute capability of the GPU, 89 for 8.9
    version     of the library that would run it
    """
    whose = f"{network.spec.name}/{graph}"
    built = [e for e in network.engines if e.graph == graph]
    if not built:
        return f"no engine of {whose} was built ahead of time"
    here = [e for e in built if e.sm == sm]
    if not here:
        others = ", ".join(f"sm{n}" for n in sorted({e.sm for e in built}))
        return f"{whose} was built for {others}; this GPU is sm{sm}"
    known = [e for e in here if e.version == version]
    if not known:
        return f"{whose} was built with {here[0].target} {here[0].version}; here is {version}"
    known = [e for e in known if e.fingerprint == _due(network, e)]
    if not known:
        return f"{whose} was built from other weights, another graph or another recipe"
    fitting = [e for e in known if covers(e.dims, dims)]
    if not fitting:
        shapes = "; ".join(shapes_text(e.dims) for e in known)
        wanted = ", ".join(f"{d}={n}" for d, n in dims.items())
        return f"{whose} was built for {shapes}; wanted: {wanted}"
    return min(fitting, key=lambda e: sum(most - least for least, _, most in e.dims.values()))


def covers(built: Mapping[str, Span], dims: Mapping[str, int]) -> bool:
    """Whether an engine takes these sizes. A size that is left open fits a range alone."""
    for name, (least, _, most) in built.items():
        if name not in dims:
            if least == most:
                return False
        elif not least <= dims[name] <= most:
            return False
    return True


def spans(graph: Graph, dims: Mapping[str, int | Span]) -> dict[str, Span]:
    """The sizes of a graph's inputs; a plain number is a range of one. A missing one: KeyError."""
    found = {name: dims[name] for name in named_dims(graph.inputs)}
    return {d: (n, n, n) if isinstance(n, int) else n for d, n in found.items()}


def shapes_text(dims: Mapping[str, Span]) -> str:
    """`B=2, h=64..96..128`"""
    return ", ".join(
        f"{d}={best}" if least == most else f"{d}={least}..{best}..{most}"
        for d, (least, best, most) in sorted(dims.items())
    )


def engine_path(
    component: str, graph: str, precision: Precision, dims: Mapping[str, Span], sm: int
) -> str:
    """Its place in the bundle; the same for the same contents."""
    sizes = "-".join(
        f"{d}{best}" if least == most else f"{d}{least}_{best}_{most}"
        for d, (least, best, most) in sorted(dims.items())
    )
    name = ".".join(part for part in (graph, precision, sizes) if part)
    return f"targets/{RTX}/sm{sm}/{component}/{name}.engine"


def what(
    network: Component, graph: str, dims: Mapping[str, Span], recipe: str = RECIPE
) -> dict[str, str]:
    """The content that an engine is made of; of backends/cache.py, the first key.

    network     a typed network: the graph's hash stands for its precision too
    """
    return {
        "component": network.spec.name,
        "weights": network.weights_sha256,
        "graph": network.graphs[graph].sha256,
        "shapes": shapes_text(dims),
        "recipe": recipe,
    }


def made(library: str, version: str, sm: int) -> dict[str, str]:
    """The maker of an engine; of backends/cache.py, the second key.

    library     `tensorrt` or `tensorrt_rtx`
    """
    return {"library": library, "version": version, "device": f"sm{sm}"}


def fingerprint(content: Mapping[str, str], maker: Mapping[str, str]) -> str:
    """SHA-256 over all that goes into an engine: equal ones need not be built again."""
    text = json.dumps([dict(content), dict(maker)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _due(network: Component, engine: Engine) -> str:
    content = what(network, engine.graph, engine.dims)
    return fingerprint(content, made(LIBRARIES[engine.target], engine.version, engine.sm))
