"""torch runs the networks themselves, from the same weight files: nothing is written."""

from __future__ import annotations

from ...backends.torch import Torch
from . import Recipe, nothing

RECIPE = Recipe("torch", ("f32", "bf16"), Torch, nothing)
