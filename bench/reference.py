"""The float32 picture that an interleaved run is judged by: made once, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import api
from ..engine.bundle import open_bundle
from ..engine.errors import SdengineError, StorageError
from .worker import model_facts


def model_of(model: str) -> dict[str, Any]:
    """What identifies the bundle, without paths of this machine; {} where it cannot be opened: the
    rows will say why."""
    try:
        facts = model_facts(open_bundle(api.find_model(model)))
    except SdengineError:
        return {}
    return {name: value for name, value in facts.items() if name not in ("path", "graphs")}


def picture(
    keep: Path | None,
    model: Mapping[str, Any],
    request: Mapping[str, Any],
    make: Callable[[], Any],
    notes: list[str],
) -> Any:
    """uint8 [H, W, 3]; None and a note where it cannot be made.

    keep    a file that holds it, or will: a picture of another checkpoint or request is made anew.
            None: made, and not kept
    raises  StorageError
    """
    made_of = json.dumps([model.get("sha256"), dict(request)], sort_keys=True)
    kept = None if keep is None or not model else _kept(keep, made_of)
    if kept is not None:
        return kept
    try:
        found = make()
    except SdengineError as error:
        notes.append(f"no float32 reference: {error.message}")
        return None
    if keep is not None and model and found is not None:
        _write(keep, found, made_of)
    return found


def _kept(path: Path, made_of: str) -> Any:
    """None: no such file, or of something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["pixels"] if str(file["made_of"]) == made_of else None
    except (OSError, ValueError, KeyError):
        return None


def _write(path: Path, pixels: Any, made_of: str) -> None:
    try:
        with path.open("wb") as file:
            np.savez(file, pixels=pixels, made_of=np.array(made_of))
    except OSError as error:
        raise StorageError(
            f"the reference cannot be kept in {path}: {error.strerror}",
            hint="name a file in a folder that you may write: --reference reference.npz",
        ) from error
