"""What a weights file amounts to: counted by safetensors' own writer and reader, read once."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sdengine.api import EMBEDDED
from sdengine.engine.errors import StorageError
from sdengine.engine.weights import Totals, totals

pytestmark = pytest.mark.export


def test_every_tensor_counts() -> None:
    path = EMBEDDED["emoji"] / "unet" / "weights.safetensors"
    with safe_open(path, "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    values = sum(math.prod(shape) for shape in shapes)
    found = totals(path, "of the embedded model")
    assert found == Totals(values, 2 * values), "it is float16 throughout"


def test_it_is_read_once_and_anew_for_another_content(tmp_path: Path) -> None:
    """A bundle that was deleted underneath goes on from memory."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros((3, 5), np.float32)}, path)
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    assert totals(path, first) == Totals(15, 60)
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(2, np.float32)}, path)
    second = hashlib.sha256(path.read_bytes()).hexdigest()
    assert totals(path, second) == Totals(17, 68)
    path.unlink()
    assert totals(path, first) == Totals(15, 60)
    with pytest.raises(StorageError, match="cannot read") as error:
        totals(path, "never seen")
    assert "permissions" in error.value.hint
