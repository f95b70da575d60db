"""Where the tokenizer's vocabulary comes from: `bpe_simple_vocab_16e6.txt.gz`, or a merges.txt.

checked by  tests/unit/test_export_vocabulary.py
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

from ..engine.bundle import MANIFEST
from ..engine.errors import MissingExtra
from .write import storage_errors

NAME = "bpe_simple_vocab_16e6.txt.gz"
HEADER = '"bpe_simple_vocab_16e6.txt#version: 0.2\n'  # the first line of the published file


def copy_vocabulary(checkpoint: Path, to: Path) -> None:
    """Put the vocabulary at `to`, as the published gzip file has it.

    checkpoint  looked into first: a bundle's own file, or a diffusers folder's tokenizer/merges.txt
    raises      MissingExtra when neither it nor open_clip has one
    """
    with storage_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        if (inside := _in_bundle(checkpoint)) is not None:
            shutil.copyfile(inside, to)
        elif (merges := checkpoint / "tokenizer" / "merges.txt").is_file():
            to.write_bytes(_from_merges(merges))
        else:
            shutil.copyfile(_of_open_clip(), to)


def _in_bundle(folder: Path) -> Path | None:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    name = json.loads(manifest.read_text(encoding="utf-8"))["model"]["tokenizer"]["file"]
    return folder / str(name)


def _from_merges(merges: Path) -> bytes:
    """merges.txt has the published file's lines 1..48894 behind a header line of its own."""
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    return gzip.compress((HEADER + "\n".join(pairs) + "\n").encode(), mtime=0)


def _of_open_clip() -> Path:
    # Found, not imported: open_clip imports torchvision, which a plain torch need not have.
    spec = importlib.util.find_spec("open_clip")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (file := Path(place) / NAME).is_file():
            return file
    raise MissingExtra(
        f"the CLIP vocabulary {NAME} is not at hand: open_clip_torch is not installed",
        hint="pip install 'sdengine[export]'",
    )
