"""IPEX runs torch's networks, from the same weight files: nothing is written. Its bundles are
exported elsewhere: torch 2.8 lacks what our tracer reads, and judging a bundle needs no trace."""

from __future__ import annotations

from ...backends.ipex import Ipex
from . import Recipe, nothing

RECIPE = Recipe("ipex", ("f32", "bf16"), Ipex, nothing)
