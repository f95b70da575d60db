"""ONNX Runtime reads the portable graphs, with their weights where they are: nothing is written."""

from __future__ import annotations

from ...backends.onnxruntime import OnnxRuntime
from . import Recipe, nothing

RECIPE = Recipe("onnxruntime", ("f32", "int8"), OnnxRuntime, nothing)
