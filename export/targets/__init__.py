"""Engines that a bundle can be made ready for: what each computes in, and what it wants on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import UnknownName
from ...engine.ports import Backend
from ...engine.spec import Component, Precision


@dataclass(frozen=True)
class Recipe:
    """How a target is made.

    precisions  that its engine can compute in, where the machine can
    backend     the engine, for judging: it keeps nothing of what it compiles
    build       writes portable artefacts below the bundle's folder; returns their paths
    """

    name: str
    precisions: tuple[Precision, ...]
    backend: Callable[[], Backend]
    build: Callable[[Path, Mapping[str, Component]], tuple[Path, ...]]


def nothing(folder: Path, components: Mapping[str, Component]) -> tuple[Path, ...]:
    """The `build` of an engine that reads the portable graphs and weights where they are."""
    return ()


def get(name: str) -> Recipe:
    """Raises UnknownName."""
    if name == "trt":
        from . import tensorrt

        return tensorrt.RECIPE
    from . import ipex, onnxruntime, openvino, torch

    known = {r.RECIPE.name: r.RECIPE for r in (openvino, onnxruntime, ipex, torch)}
    if name not in known:
        raise UnknownName("target", name, known)
    return known[name]
