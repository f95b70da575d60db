"""The content of a checkpoint as one hash: the key under which its export is kept.

Nothing here needs torch, and files are hashed once: engine.hashes remembers them.

checked by  tests/unit/checkpoint/test_fingerprint.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..engine.hashes import Progress, remembered_sha256


def sidecar(path: Path) -> Path | None:
    """The yaml that lies beside a model file under the same name."""
    beside = (path.with_suffix(end) for end in (".yaml", ".yml"))
    return next((p for p in beside if p.is_file()), None)


def of_file(path: Path, progress: Progress | None = None) -> str:
    return remembered_sha256(path, progress=progress)


def of_files(root: Path, files: Iterable[Path], progress: Progress | None = None) -> str:
    """Over names and contents: sorted lines `relative name, space, SHA-256`."""
    return of_digests(
        {f.relative_to(root).as_posix(): remembered_sha256(f, progress=progress) for f in files}
    )


def of_digests(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
