"""What the passes share: copying, saving, and the specs of a graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from ...engine.spec import TensorSpec

_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


def copy_of(model: ir.Model) -> ir.Model:
    """A model of its own; weights are references to a file and are not read."""
    return ir.from_proto(ir.to_proto(model))


def save(model: ir.Model, path: Path) -> None:
    """Write the graph; the same graph gives the same bytes."""
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph, as a manifest has them."""
    return tuple(
        TensorSpec(
            str(v.name),
            _NAMES[v.dtype],  # type: ignore[index, arg-type]
            tuple(d if isinstance(d, int) else str(d) for d in v.shape or ()),
        )
        for v in values
    )
