"""sdengine: Stable Diffusion 2 as engines. `sdengine.load("bundle")(prompt="a fox").image`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "Request", "load"]

if TYPE_CHECKING:
    from .api import load
    from .engine.pipeline import Pipeline
    from .engine.request import Request

_HOMES = {"load": "api", "Pipeline": "engine.pipeline", "Request": "engine.request"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import sdengine` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
