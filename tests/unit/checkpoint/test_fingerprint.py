"""The content's hash: what it depends on, and what not."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest

from sdengine.engine import hashes
from sdengine.engine.errors import NotACheckpoint
from sdengine.export.checkpoint import fingerprint, open_checkpoint

pytestmark = pytest.mark.export


@pytest.fixture
def folder(tmp_path):
    """A folder in diffusers' layout; the fingerprint looks at files, not at their meaning."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    root = tmp_path / "model"
    files = {
        "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
        "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
        "text_encoder": ("config.json", "model.safetensors"),
        "scheduler": ("scheduler_config.json", None),
    }
    for name, (config, weights) in files.items():
        (root / name).mkdir(parents=True)
        (root / name / config).write_text("{}")
        if weights:
            save_file({"a": np.ones(1, np.float32)}, root / name / weights)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root


def test_a_file_s_fingerprint_is_its_sha256(base, tmp_path):
    path = tmp_path / "alone.safetensors"
    shutil.copy(base, path)
    want = hashlib.sha256(base.read_bytes()).hexdigest()
    assert fingerprint(path) == want


def test_name_and_date_do_not_count(base, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.ckpt"
    shutil.copy(base, first)
    shutil.copy(base, second)
    os.utime(second, (1, 1))
    assert fingerprint(first) == fingerprint(second)


def test_one_changed_byte_counts(base, tmp_path):
    path = tmp_path / "a.safetensors"
    raw = bytearray(base.read_bytes())
    path.write_bytes(raw)
    before = fingerprint(path)
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert fingerprint(path) != before


def test_the_config_counts(base, tmp_path):
    """The same weights read as eps and as v are two models."""
    path = tmp_path / "a.safetensors"
    shutil.copy(base, path)
    alone = fingerprint(path)
    (tmp_path / "a.yaml").write_text("prediction: v")
    beside = fingerprint(path)
    (tmp_path / "other.yaml").write_text("prediction: eps")
    given = fingerprint(path, config=tmp_path / "other.yaml")
    (tmp_path / "a.yaml").unlink()
    only_given = fingerprint(path, config=tmp_path / "other.yaml")
    assert len({alone, beside, given, only_given}) == 4
    assert fingerprint(path) == alone


def test_the_source_s_sha256_is_the_file_s_own(base):
    """What a publisher prints, whatever lies beside the file."""
    checkpoint = open_checkpoint(base)
    assert base.with_suffix(".yaml").is_file()
    want = hashlib.sha256(base.read_bytes()).hexdigest()
    assert checkpoint.sha256 == checkpoint.facts.source.sha256 == want


def test_a_folder_s_fingerprint(folder):
    """SHA-256 over the sorted lines `name SHA-256` of the files that are used."""
    used = [p for p in folder.rglob("*") if p.is_file()]
    digests = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in used
    }
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    want = hashlib.sha256(lines.encode()).hexdigest()
    assert fingerprint(folder) == want
    (folder / "README.md").write_text("a card")  # not used
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("not looked at")
    assert fingerprint(folder) == want
    (folder / "vae" / "config.json").write_text('{"scaling_factor": 0.2}')
    assert fingerprint(folder) != want


def test_a_second_look_reads_nothing(base, monkeypatch):
    want = fingerprint(base)

    def forbidden(*args):
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashes, "sha256_of", forbidden)
    assert fingerprint(base) == want


def test_progress_covers_the_file(base, tmp_path):
    path = tmp_path / "fresh.safetensors"
    shutil.copy(base, path)
    seen = []
    fingerprint(path, progress=lambda done, total: seen.append((done, total)))
    size = path.stat().st_size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_model_no_fingerprint(tmp_path):
    with pytest.raises(NotACheckpoint, match="does not exist") as caught:
        fingerprint(tmp_path / "none.safetensors")
    assert "check the path" in caught.value.hint
