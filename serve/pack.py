"""One file for a box without internet: the bundle, the wheels, and what installs both.

    pack.json       what it is for, and the size and SHA-256 of every other file
    install.py      in a .tar; in a .pyz, which runs by itself, `__main__.py`
    bundle/  wheels/  share/

checked by  tests/serve/test_pack.py
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import io
import json
import os
import platform
import secrets
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.bundle import MANIFEST, Bundle
from ..engine.errors import PackError, RequestError
from ..engine.images import storage_error
from .wheels import HERE, Target, gather

KINDS = (".pyz", ".tar")
# `python3 x.pyz` reads its own directory with a module that knows no zip64 before Python 3.13
LARGEST_PYZ = 2**31 - 2**26
ENVIRONMENT = 40 * 2**20  # bytes of a virtual environment beside what is installed into it

Progress = Callable[[str, float], None]


def check_name(out: Path) -> None:
    """Raises RequestError for a name that says no kind of file."""
    if out.suffix not in KINDS:
        raise RequestError(
            f"{out.name}: {out.suffix or 'no suffix'} is no kind of pack",
            hint="end it in .pyz (runs by itself, up to 2 GB) or .tar",
        )


def pack(
    bundle: Bundle,
    out: Path,
    *,
    extras: Sequence[str] = (),
    target: Target = HERE,
    links: Path | None = None,
    name: str | None = None,
    progress: Progress = lambda what, done: None,
) -> Path:
    """Write the file `out`, whole or not at all.

    extras      of sdengine, to go with it
    links       a folder of wheels, in place of the package index
    name        of the bundle's folder on the box; None: as it is called here
    raises      PackError, RequestError, StorageError, CorruptPart
    """
    check_name(out)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch) / "wheels"
        wheels.mkdir()
        progress("fetching the wheels", 0.0)
        requirement = gather(wheels, extras, target, links)
        files = _files(bundle, wheels)
        progress("hashing", 0.0)
        facts = _facts(bundle, files, requirement, target, wheels, name)
        total = sum(known["size"] for known in facts["files"].values())
        if out.suffix == ".pyz" and total > LARGEST_PYZ:
            raise PackError(
                f"{total / 1e9:.1f} GB do not fit into a .pyz, which holds"
                f" {LARGEST_PYZ / 1e9:.1f} GB",
                hint=f"make a .tar: --out {out.with_suffix('.tar')}",
            )
        _write(out, facts, files, progress)
    return out


def _files(bundle: Bundle, wheels: Path) -> dict[str, Path]:
    """Name in the pack -> file here."""
    unit = importlib.resources.files(__package__) / "sdengine.service"
    return {
        **{f"bundle/{name}": bundle.path / name for name in (MANIFEST, *sorted(bundle.files))},
        **{f"wheels/{path.name}": path for path in sorted(wheels.iterdir())},
        "share/sdengine.service": Path(str(unit)),
    }


def _facts(
    bundle: Bundle,
    files: Mapping[str, Path],
    requirement: str,
    target: Target,
    wheels: Path,
    name: str | None,
) -> dict[str, Any]:
    sizes = {place: path.stat().st_size for place, path in files.items()}
    listing = {place: {"size": sizes[place], "sha256": _hash(p)} for place, p in files.items()}
    weights = sum(size for place, size in sizes.items() if place.startswith("bundle/"))
    installed = sum(_unpacked(wheel) for wheel in wheels.iterdir())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    identity = json.dumps(listing, sort_keys=True).encode()
    return {
        "format": 1,
        "id": hashlib.sha256(identity).hexdigest(),
        "sdengine": __version__,
        "requirement": requirement,
        "python": python if target.python is None else target.python,
        "machine": platform.machine() if target.machine is None else target.machine,
        "bundle": {"name": bundle.path.name if name is None else name, "id": bundle.id},
        "installed_bytes": weights + installed + ENVIRONMENT,
        "files": listing,
    }


def _hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unpacked(wheel: Path) -> int:
    """Bytes that a wheel holds on the disk, beside its own while it is installed."""
    with zipfile.ZipFile(wheel) as opened:
        return wheel.stat().st_size + sum(entry.file_size for entry in opened.infolist())


class _Tar:
    script = "install.py"

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)

    def text(self, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self._tar.addfile(entry, io.BytesIO(content))

    def file(self, name: str, path: Path) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = path.stat().st_size
        with open(path, "rb") as stream:
            self._tar.addfile(entry, stream)

    def close(self) -> None:
        self._tar.close()


class _Zip:
    """Stored, not packed: weights and wheels do not get smaller."""

    script = "__main__.py"

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def text(self, name: str, content: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(name), content)

    def file(self, name: str, path: Path) -> None:
        entry = zipfile.ZipInfo(name)
        entry.file_size = path.stat().st_size
        with open(path, "rb") as stream, self._zip.open(entry, "w") as target:
            while chunk := stream.read(2**20):
                target.write(chunk)

    def close(self) -> None:
        self._zip.close()


def _write(
    out: Path, facts: Mapping[str, Any], files: Mapping[str, Path], progress: Progress
) -> None:
    script = (importlib.resources.files(__package__) / "installer.py").read_bytes()
    part = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    done, total = 0, sum(known["size"] for known in facts["files"].values())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        archive: _Tar | _Zip = _Zip(part) if out.suffix == ".pyz" else _Tar(part)
        archive.text(archive.script, script)
        archive.text("pack.json", json.dumps(facts, indent=1).encode())
        for name, path in files.items():
            archive.file(name, path)
            done += facts["files"][name]["size"]
            progress("writing", done / total)
        archive.close()
        os.replace(part, out)
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
