"""Torch pickles (.ckpt, .pt, .bin) read without running anything that they ask for.

torch's own weights-only reader does the work. It knows tensors and plain containers; the first
other name that a pickle asks for ends the reading, before anything is called.

checked by  tests/unit/checkpoint/test_pickle.py
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..engine.errors import NotACheckpoint, UnsafeCheckpoint
from .containers import TORCH, Bytes, TensorRef, cannot_read

_CODES = {dtype: code for code, dtype in TORCH.items()}


class Inert:
    """Stands for the classes below: takes what it is given, keeps nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Training leaves these beside the weights. They are replaced by Inert, never imported.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.types._METRIC",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def read_pickle(path: Path) -> dict[str, TensorRef]:
    """The tensors of the state dict, unwrapped as often as it is nested.

    A zip archive is mapped; the format before torch 1.6 has to be read whole.
    raises      UnsafeCheckpoint, NotACheckpoint, StorageError
    """
    loaded = load_pickle(path)
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    named = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise NotACheckpoint(
            f"{path} is a torch file without a single named tensor",
            hint="give the file that holds the model's weights (its `state_dict`)",
        )
    return {name: _ref(path, name, tensor) for name, tensor in tensors.items()}


def load_pickle(path: Path) -> Any:
    """What the file holds, as it is. Raises as `read_pickle`."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        with (
            torch.serialization.safe_globals([(Inert, name) for name in _HARMLESS]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch warns of its own old storage classes
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        _refuse(path, error)
    except Exception as error:  # torch's reader raises nearly any class on damaged bytes
        raise NotACheckpoint(
            f"{path} is not a sound torch file: {(str(error) or repr(error)).splitlines()[0]}",
            hint="it is damaged or truncated: fetch it again and compare its size",
        ) from error


def _refuse(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    text = str(error)
    if "truncated" in text:
        raise NotACheckpoint(
            f"{path} is truncated: {text.splitlines()[0]}", hint="fetch the file again"
        ) from error
    asked = re.search(r"(?:GLOBAL|global|function|class):? ([\w.]+\.[\w.]+)", text)
    what = f"asks for {asked[1]}" if asked else f"is not made of tensors alone ({text[:160]})"
    raise UnsafeCheckpoint(
        f"{path} {what}; nothing of it was run",
        hint="take the model's .safetensors file; if there is none and you trust the publisher, "
        "save the weights as safetensors on a machine of no importance",
    ) from error


def _ref(path: Path, name: str, tensor: torch.Tensor) -> TensorRef:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _CODES:
        raise NotACheckpoint(
            f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}",
            hint="save it as a dense tensor of float16, bfloat16 or float32",
        )

    def read() -> Bytes:
        flat: Bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return flat

    return TensorRef(name, _CODES[tensor.dtype], tuple(tensor.shape), read)
