"""Files that are read, and files that are refused, told apart by content."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from sdengine.engine.errors import NotACheckpoint, StorageError
from sdengine.export import containers
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.containers import open_container

pytestmark = pytest.mark.export


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b"" if isinstance(header, bytes) else b" " * (-len(raw) % 8)  # as the library pads
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict:
    sides = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": sides, "data_offsets": [begin, end]}


def test_bytes_and_tensors_are_those_of_the_safetensors_library(tmp_path):
    """Every dtype that weights come in, a scalar and an empty tensor."""
    torch.manual_seed(0)
    made = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(2, 3, 4).half(),
        "bf16": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([1, 2, 3]),
        "flag": torch.tensor([True, False]),
    }
    save_torch(made, tmp_path / "a.safetensors", metadata={"modelspec.license": "some"})
    opened = open_container(tmp_path / "a.safetensors")
    assert opened.kind == "safetensors"
    assert opened.metadata == {"modelspec.license": "some"}
    assert set(opened.tensors) == set(made)
    for name, want in load_torch(tmp_path / "a.safetensors").items():
        ref = opened.tensors[name]
        assert torch.equal(ref.torch(), want), name
        assert ref.torch().dtype == want.dtype
        assert bytes(ref.numpy_bytes()) == want.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert ref.nbytes == want.numel() * want.element_size()


def test_odd_header_length_reads_right(tmp_path):
    """A header that is no multiple of 8 leaves the data unaligned."""
    want = np.arange(6, dtype=np.float32)
    raw = json.dumps({"a": entry(0, 24)}).encode()
    raw += b" " * ((1 - len(raw)) % 4)
    assert len(raw) % 4 == 1
    (tmp_path / "odd.safetensors").write_bytes(safetensors_bytes(raw, want.tobytes()))
    tensor = open_container(tmp_path / "odd.safetensors").tensors["a"].torch()
    assert tensor.data_ptr() % 4 == 0
    assert np.array_equal(tensor.numpy(), want)


def test_a_write_to_a_tensor_never_reaches_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(4, np.float32)}, path)
    before = path.read_bytes()
    open_container(path).tensors["a"].torch().fill_(7)
    assert path.read_bytes() == before


def test_a_large_file_is_mapped_not_read(tmp_path):
    """2.6 GB (sparse on disk), opened in a process that may not allocate 1 GB."""
    path = tmp_path / "large.safetensors"
    size = 2_600_000_000
    header = safetensors_bytes(
        {"big": entry(0, size - 8), "last": entry(size - 8, size, shape=[2])}
    )
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        file.seek(-8, 2)
        file.write(struct.pack("<2f", 1.5, -2.0))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sdengine.export.containers import open_container\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "refs = open_container(Path(sys.argv[1])).tensors\n"
        "assert refs['big'].torch().shape[0] == 649999998\n"
        "print(refs['last'].torch().tolist())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    )
    values, grown_kib = done.stdout.splitlines()
    assert values == "[1.5, -2.0]"
    assert int(grown_kib) < 50_000


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"", "is empty", "compare its size"),
        (b"just some text, not a model at all", "neither a safetensors file nor", "diffusers"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is a PNG picture", ".safetensors or .ckpt"),
        (b"\xff\xd8\xff\xe0" + bytes(64), "is a JPEG picture", ".safetensors or .ckpt"),
        (b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file", ".safetensors or .ckpt"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5214865159\n",
            "is a Git LFS pointer of 72 bytes",
            "git lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html>Login</html>", "is a web page", "login"),
        (b"<html><body>404", "is a web page", "download the file itself"),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_foreign_files_are_named(tmp_path, content, message, hint, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    if suffix == ".safetensors" and content.startswith(b"just"):
        message, hint = "header would have", "fetch the file again"
    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(path)
    assert message in caught.value.message
    assert hint in caught.value.hint


DAMAGED = {
    "header longer than the file": (
        struct.pack("<Q", 5000) + b'{"a": 1}',
        "is truncated: its header alone has 5000 bytes, the file has 16",
    ),
    "header of 2^60 bytes": (struct.pack("<Q", 2**60) + b"{}", "header would have 115"),
    "four bytes": (b"{}{}", "the file has 4"),
    "tensor beyond the end": (
        safetensors_bytes({"a": entry(0, 16)}, bytes(8)),
        "is truncated: its tensors need",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        "tensors 'a' and 'b' overlap",
    ),
    "length against shape": (
        safetensors_bytes({"a": entry(0, 16, shape=[5])}, bytes(16)),
        "the header says of tensor 'a'",
    ),
    "unknown dtype": (
        safetensors_bytes({"a": entry(0, 16, dtype="F7")}, bytes(16)),
        "the header says of tensor 'a'",
    ),
    "dtype is a list": (
        safetensors_bytes(
            {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, bytes(16)
        ),
        "the header says of tensor 'a'",
    ),
    "negative offset": (
        safetensors_bytes({"a": entry(-16, 0)}, bytes(16)),
        "the header says of tensor 'a'",
    ),
    "offsets missing": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [4]}}, bytes(16)),
        "the header says of tensor 'a'",
    ),
    "entry is a number": (safetensors_bytes({"a": 1}), "the header says of tensor 'a'"),
    "a name twice": (
        safetensors_bytes(b'{"a":1,"a":1}'),
        "a name stands twice",
    ),
    "cut JSON": (safetensors_bytes(b'{"a": '), "not sound JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not sound JSON"),
    "deep nesting": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "not sound JSON"),
    "a list": (safetensors_bytes(b"[1, 2, 3]"), "no JSON object"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors_are_refused(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(path)
    assert message in caught.value.message
    assert "fetch the file again" in caught.value.hint


def test_every_cut_of_a_safetensors_file_is_refused(base, tmp_path):
    """Whatever the length that is left, never a wrong tensor and never another exception."""
    whole = base.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [1, 7, 8, 9, 100, 50_000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(NotACheckpoint):
            open_checkpoint(path)


def test_the_name_does_not_decide(base, tmp_path):
    """Safetensors content under the name of a pickle is read as what it is."""
    path = tmp_path / "model.ckpt"
    shutil.copy(base, path)
    shutil.copy(base.with_suffix(".yaml"), tmp_path / "model.yaml")
    assert open_checkpoint(path).kind == "safetensors"


def test_missing_file_names_its_neighbours(base, tmp_path):
    shutil.copy(base, tmp_path / "v2-1_512.safetensors")
    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(tmp_path / "v2-1_521.safetensors")
    assert "does not exist" in caught.value.message
    assert "v2-1_512.safetensors" in caught.value.hint


def test_a_pipe_is_no_model(tmp_path):
    """It would never end."""
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(NotACheckpoint, match="no regular file") as caught:
        open_checkpoint(tmp_path / "pipe.ckpt")
    assert "diffusers folder" in caught.value.hint


def test_a_name_that_is_not_utf8(base, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(base, path)
    shutil.copy(base.with_suffix(".yaml"), path.with_suffix(".yaml"))
    facts = open_checkpoint(path).facts
    assert facts.name == "caf?"
    assert facts.source.file == "caf?.safetensors"


@pytest.mark.parametrize("length", [0x8B1F, 0x0280, 0x0380])
def test_header_lengths_that_look_like_another_format(tmp_path, length):
    """Little endian they begin like gzip and like pickles of protocol 2 and 3."""
    raw = json.dumps({"a": entry(0, 8)}).encode().ljust(length)
    path = tmp_path / "a.ckpt"
    path.write_bytes(safetensors_bytes(raw, struct.pack("<2f", 1, 2)))
    assert open_container(path).tensors["a"].torch().tolist() == [1, 2]


def test_missing_folder(tmp_path):
    with pytest.raises(NotACheckpoint, match="does not exist") as caught:
        open_checkpoint(tmp_path / "nowhere" / "model.ckpt")
    assert "check the path" in caught.value.hint


def test_unreadable_file(base, monkeypatch):
    """Root may read everything, so the refusal is the system's answer, put in by hand."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(containers, "open", refuse, raising=False)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        open_checkpoint(base)
    assert "permissions" in caught.value.hint


def test_folder_without_a_model(tmp_path):
    with pytest.raises(NotACheckpoint, match=r"neither model_index\.json") as caught:
        open_checkpoint(tmp_path)
    assert "the folder holds nothing" in caught.value.hint
    (tmp_path / "v2.ckpt").write_bytes(b"x")
    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "give the file itself: v2.ckpt"


def test_tensors_are_the_file_s_own(base):
    """Names, shapes and values through open_checkpoint, against the safetensors library."""
    tensors = open_checkpoint(base).tensors
    arrays = load_file(base)
    for name, ref in tensors.items():
        assert ref.shape == arrays[name].shape
        assert ref.dtype == "F16"
    assert np.array_equal(
        tensors["model.diffusion_model.out.2.weight"].torch().numpy(),
        arrays["model.diffusion_model.out.2.weight"],
    )
