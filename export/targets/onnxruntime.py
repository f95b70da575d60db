"""ONNX Runtime reads the portable graphs, with their weights where they are: nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...backends.onnxruntime import OnnxRuntime
from ...engine.spec import Component
from . import Recipe


def _build(folder: Path, components: Mapping[str, Component]) -> tuple[Path, ...]:
    return ()


RECIPE = Recipe("onnxruntime", ("f32",), OnnxRuntime, _build)
