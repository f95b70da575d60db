"""OpenVINO reads the portable graphs, with their weights where they are: nothing is written.

Its own format would hold the same weights a second time. What it compiles for one machine and one
shape is kept in that machine's cache (backends/cache.py), not in the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...backends.cache import Store
from ...backends.openvino import OpenVINO
from ...engine.spec import Component
from . import Recipe


def _build(folder: Path, components: Mapping[str, Component]) -> tuple[Path, ...]:
    return ()


RECIPE = Recipe("openvino", ("f32", "bf16"), lambda: OpenVINO(Store(limit=0)), _build)
