"""The weights of a large network, over files whose pages are given back while it is compiled.

OpenVINO widens weights that are stored in half precision to float32 before it packs them for its
kernels, and holds both until the network is closed: 3.5 GB for a UNet of 866 M parameters, beside
3.5 GB of packed weights in float32 or 1.7 GB in bfloat16. We widen them ourselves into a file that
has no name any more, and hand out constants over a mapping of it, whose pages are given back while
they are packed (`mapping.Mapped`). Those in int8 are read as they are, and get a mapping of ours of
the very file: OpenVINO's own cannot be given back, as it lets go of it when it likes, and what then
has the addresses would be emptied.

checked by  tests/unit/test_openvino_weights.py
"""

from __future__ import annotations

import logging
import mmap
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..engine.ports import Array
from ..engine.weights import Stored, each_tensor, read_header
from .mapping import Mapped

log = logging.getLogger("sdengine.backends")

LARGE = 256 << 20  # bytes as stored: below it, memory is not the question
ALIGNED = 64  # bytes
INT8 = "/int8"  # behind the tensor's name: what graphs call a weight in int8
SPARE = 1.5  # of what is written: other files grow meanwhile


class _Place(NamedTuple):
    """Where a widened tensor lies in the file, and how many it holds."""

    offset: int
    numbers: int


def widen(model: Any, weights: Path, folder: Path, large: int = LARGE) -> Mapped | None:
    """Put float32 constants over a file in the place of an openvino.Model's widened ones.

    weights     the safetensors file whose tensors the constants of the model are
    folder      where the file is written, on a disk; it vanishes with the returned mapping
    large       bytes of half precision from which on it is done
    returns     the mapping, which must outlive what is compiled of the model; None where nothing
                was done: too little to gain, no room, or pages that cannot be given back
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    found = _widened(model, weights)
    numbers = sum(int(np.prod(node.get_output_shape(0))) for node in found.values())
    if 2 * numbers < large:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < SPARE * 4 * numbers:
            log.info("%s has %.1f GB free: weights are widened in memory", folder, free / 1e9)
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            places = _write(file, weights, found)
            mapped = Mapped(file)
    except OSError as error:
        log.info("weights are widened in memory: %s: %s", folder, error)
        return None
    _replace(found, places, mapped)
    return mapped


def remap(model: Any, weights: Path, large: int = LARGE) -> Mapped | None:
    """Put constants over a mapping of ours in the place of an openvino.Model's in int8.

    weights     the safetensors file whose tensors the constants of the model are
    large       bytes of them from which on it is done
    returns     as `widen`
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    found = _whole(model, read_header(weights))
    if sum(stored.nbytes for _, stored in found) < large:
        return None
    try:
        mapped = Mapped(weights)
    except OSError as error:
        log.info("weights in int8 stay in memory while they are packed: %s", error)
        return None
    for node, stored in found:
        end = stored.offset + stored.nbytes
        _stand_in(node, mapped.data[stored.offset : end].view(np.int8))
    return mapped


def _whole(model: Any, stored: Mapping[str, Stored]) -> list[tuple[Any, Stored]]:
    """The constants in int8, and where each lies in the file."""
    names = {name + INT8: tensor for name, tensor in stored.items() if tensor.dtype == "I8"}
    found = []
    for node in model.get_ordered_ops():
        tensor = names.get(node.get_friendly_name())
        if tensor is not None and node.get_type_name() == "Constant":
            if tensor.shape == tuple(node.get_output_shape(0)):
                found.append((node, tensor))
    return found


def _widened(model: Any, weights: Path) -> dict[str, Any]:
    """tensor of the file -> the node that widens it from half precision to float32."""
    stored = read_header(weights)
    found: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or node.get_element_type().to_string() != "f32":
            continue
        source = node.input_value(0).get_node()
        name = source.get_friendly_name()
        if source.get_type_name() == "Constant" and name in stored and name not in found:
            tensor = stored[name]
            if tensor.dtype == "F16" and tensor.shape == tuple(source.get_output_shape(0)):
                found[name] = node
    return found


def _write(file: IO[bytes], weights: Path, names: Mapping[str, Any]) -> dict[str, _Place]:
    places = {}
    for name, values in each_tensor(weights, names):
        file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
        places[name] = _Place(file.tell(), values.size)
        file.write(values.data)
    file.flush()
    return places


def _replace(nodes: Mapping[str, Any], places: Mapping[str, _Place], mapped: Mapped) -> None:
    for name, node in nodes.items():
        offset, numbers = places[name]
        _stand_in(node, mapped.data[offset : offset + 4 * numbers].view(np.float32))


def _stand_in(node: Any, values: Array) -> None:
    """Put a constant over these numbers in the node's place."""
    from openvino import op  # type: ignore[import-untyped]

    made = op.Constant(values.reshape(list(node.get_output_shape(0))), shared_memory=True)
    made.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(made.output(0))
