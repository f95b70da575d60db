"""A checkpoint in, a bundle out. Needs the extra `export`; importing this imports no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..engine.errors import MissingExtra

if TYPE_CHECKING:
    from .asked import nvidia_ask
    from .checkpoint import fingerprint, open_checkpoint
    from .classifier import open_classifier
    from .compare import compared, shown
    from .nvidia import add_nvidia
    from .run import add_classifier, add_target, export_bundle
    from .triton import repository

__all__ = [
    "add_classifier",
    "add_nvidia",
    "add_target",
    "compared",
    "export_bundle",
    "fingerprint",
    "nvidia_ask",
    "open_checkpoint",
    "open_classifier",
    "repository",
    "shown",
]

_HOMES = {
    "add_classifier": "run",
    "add_nvidia": "nvidia",
    "add_target": "run",
    "compared": "compare",
    "export_bundle": "run",
    "fingerprint": "checkpoint",
    "nvidia_ask": "asked",
    "open_checkpoint": "checkpoint",
    "open_classifier": "classifier",
    "repository": "triton",
    "shown": "compare",
}
# import name -> distribution
PACKAGES = {
    "torch": "torch",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
}


def require_extra() -> None:
    """Raises MissingExtra when a package that exporting needs is not installed."""
    if missing := [dist for name, dist in PACKAGES.items() if find_spec(name) is None]:
        raise MissingExtra(
            f"exporting needs {', '.join(missing)}, not installed here",
            hint="pip install 'sdengine[export]'",
        )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
