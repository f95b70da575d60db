"""OpenVINO reads the portable graphs, with their weights where they are: nothing is written.

Its own format would hold the same weights a second time. What it compiles for one machine and one
shape is kept in that machine's cache (backends/cache.py), not in the bundle.
"""

from __future__ import annotations

from ...backends.cache import Store
from ...backends.openvino import OpenVINO
from . import Recipe, nothing

RECIPE = Recipe("openvino", ("f32", "bf16", "int8"), lambda: OpenVINO(Store(limit=0)), nothing)
