"""The vocabulary file: the published one, or the same content from a merges.txt."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdengine.engine.bundle import TokenizerFacts
from sdengine.engine.errors import MissingExtra
from sdengine.engine.tokenizer import Tokenizer
from sdengine.export.vocabulary import NAME, copy_vocabulary

pytestmark = pytest.mark.export

FACTS = TokenizerFacts(start=49406, end=49407, pad=0, length=77)


def published() -> Path:
    """open_clip's own file, found by hand."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.submodule_search_locations[0]) / NAME


def test_from_open_clip_without_importing_it(tmp_path):
    """open_clip imports torchvision, which `export` does not need."""
    script = (
        "import sys; from pathlib import Path;"
        "from sdengine.export.vocabulary import copy_vocabulary;"
        f"copy_vocabulary(Path('x.safetensors'), Path({str(tmp_path / 'v')!r}));"
        "sys.exit('open_clip' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "v").read_bytes() == published().read_bytes()


def test_from_a_diffusers_folder(tmp_path):
    """merges.txt as transformers writes it gives the same ids."""
    lines = gzip.decompress(published().read_bytes()).decode().split("\n")
    folder = tmp_path / "model" / "tokenizer"
    folder.mkdir(parents=True)
    merges = "\n".join(["#version: 0.2", *lines[1 : 49152 - 256 - 2 + 1]]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    copy_vocabulary(tmp_path / "model", tmp_path / "v")
    mine, theirs = Tokenizer(tmp_path / "v", FACTS), Tokenizer(published(), FACTS)
    for prompt in ("", "a slice of pizza", "Ünïcödé 123 ½ 日本語", "#hashtag #version"):
        assert mine.encode(prompt) == theirs.encode(prompt)


def test_from_a_bundle(tmp_path):
    (tmp_path / "b" / "words").mkdir(parents=True)
    (tmp_path / "b" / "words" / "v.gz").write_bytes(b"its own")
    manifest = {"model": {"tokenizer": {"file": "words/v.gz"}}}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    copy_vocabulary(tmp_path / "b", tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == b"its own"


def test_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="open_clip_torch is not installed") as error:
        copy_vocabulary(tmp_path / "x.safetensors", tmp_path / "v")
    assert error.value.hint == "pip install 'sdengine[export]'"
