"""The weights file, against the safetensors library and the runtime's own header reader."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdengine.engine.weights import read_header
from sdengine.export.containers import TensorRef, open_container
from sdengine.export.weights_file import read_weights, write_weights

pytestmark = pytest.mark.export

DTYPES = {"F16": np.dtype("<u2"), "BF16": np.dtype("<u2"), "F32": np.dtype("<u4")}


def ref(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> TensorRef:
    raw = np.random.default_rng(seed).integers(0, 255, math.prod(shape) * DTYPES[dtype].itemsize)
    data = raw.astype(np.uint8)
    return TensorRef(name, dtype, shape, lambda: data)


MIXED = [
    ref("a.bias", "F32", (3,), 1),
    ref("b.weight", "F16", (32, 4), 2),
    ref("c.bias", "F16", (5,), 3),
    ref("d.weight", "BF16", (7, 64), 4),
    ref("e.scalar", "F32", (), 5),
]


def test_the_library_reads_what_was_written(tmp_path):
    sha256 = write_weights(tmp_path / "w.safetensors", MIXED)
    found = load_file(tmp_path / "w.safetensors")
    assert sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert found.keys() == {t.name for t in MIXED}
    for t in MIXED:
        assert tuple(found[t.name].shape) == t.shape
        assert found[t.name].reshape(-1).view(torch.uint8).numpy().tobytes() == bytes(
            t.numpy_bytes()
        ), t.name


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 70), max_size=3)),
        min_size=1,
        max_size=12,
    )
)
def test_alignment(tmp_path_factory, tensors):
    """Sizes that are multiples of 64 bytes start at multiples of 64; all at their element's."""
    refs = [ref(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    path = tmp_path_factory.mktemp("aligned") / "w.safetensors"
    write_weights(path, refs)
    for where in read_header(path).values():
        assert where.offset % DTYPES[where.dtype].itemsize == 0
        if where.nbytes % 64 == 0:
            assert where.offset % 64 == 0
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_order_of_the_tensors_does_not_matter(tmp_path):
    one = write_weights(tmp_path / "1", MIXED)
    two = write_weights(tmp_path / "2", reversed(MIXED))
    assert one == two


def test_read_back(tmp_path):
    values = {"x": torch.randn(4, 3).half(), "y": torch.randn(64).bfloat16(), "z": torch.ones(2)}
    save_file(values, tmp_path / "w.safetensors")
    found = dict(read_weights(tmp_path / "w.safetensors"))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[n], values[n]) for n in values)


def test_writing_leaves_a_mapped_source_as_it_was(tmp_path):
    """Pages are let go while writing; the checkpoint can be read again afterwards."""
    values = {"x": torch.randn(300, 300), "y": torch.randn(17)}
    save_file(values, tmp_path / "source.safetensors")
    source = open_container(tmp_path / "source.safetensors")
    write_weights(tmp_path / "w.safetensors", source.tensors.values())
    assert torch.equal(source.tensors["x"].torch(), values["x"])
    assert torch.equal(load_file(tmp_path / "w.safetensors")["y"], values["y"])
