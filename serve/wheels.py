"""The wheels that a box needs: our own, and with pip those of everything that it depends on.

checked by  tests/serve/test_pack.py
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..engine.errors import PackError

ROOT = Path(__file__).resolve().parents[1]
# glibc versions whose wheels a box of another kind may take: from 2014's to Debian 12's
GLIBC = tuple(range(17, 37))


@dataclass(frozen=True)
class Target:
    """The box. python, machine   `3.11`, `aarch64`; None: like this machine."""

    python: str | None = None
    machine: str | None = None

    def options(self) -> list[str]:
        """pip's, where the box is another than this."""
        if self.python is None and self.machine is None:
            return []
        machine = _machine() if self.machine is None else self.machine
        python = _python() if self.python is None else self.python
        tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC] + [f"manylinux2014_{machine}"]
        platforms = [word for tag in tags for word in ("--platform", tag)]
        return ["--python-version", python, "--implementation", "cp", *platforms]


HERE = Target()


def gather(folder: Path, extras: Sequence[str], target: Target, links: Path | None = None) -> str:
    """Fill `folder` with wheels; gives the requirement that installs them all.

    links       a folder of wheels, in place of the package index
    raises      PackError
    """
    if importlib.util.find_spec("pip") is None:
        raise PackError(
            f"{sys.executable} has no pip, which fetches the wheels",
            hint=f"{sys.executable} -m ensurepip",
        )
    source = [] if links is None else ["--no-index", "--find-links", str(links)]
    own = _own_wheel(folder, source)
    wanted = f"sdengine[{','.join(extras)}]" if extras else "sdengine"
    constraints = ROOT / "constraints.txt"
    pinned = ["--constraint", str(constraints)] if constraints.is_file() else []
    _pip(
        [
            "download", "--only-binary=:all:", "--dest", str(folder), "--find-links", str(folder),
            *source, *target.options(), *pinned, f"{wanted} @ {own.as_uri()}", "pip",
        ],
        links,
    )  # fmt: skip
    return f"{wanted}=={__version__}"


def _own_wheel(folder: Path, source: Sequence[str]) -> Path:
    """Built from the source tree, or put together again from what is installed here."""
    if not (ROOT / "pyproject.toml").is_file():
        return repack(importlib.metadata.distribution("sdengine"), folder)
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.split(".")[1] for name in facts["tool"]["setuptools"]["packages"][1:]}
    files = ["pyproject.toml", "README.md", "LICENSE", *(p.name for p in ROOT.glob("*.py"))]
    with tempfile.TemporaryDirectory() as scratch:  # pip builds in the tree that it is given
        tree = Path(scratch) / "tree"
        tree.mkdir()
        for name in files:
            shutil.copy(ROOT / name, tree)
        for name in (*packages, "models"):
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results")
            )
        _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), *source, str(tree)], None)
    return next(folder.glob("sdengine-*.whl"))


def repack(distribution: importlib.metadata.Distribution, folder: Path) -> Path:
    """A wheel of what is installed: its own files and their record, without what pip added.

    raises      PackError when it is not installed from a wheel
    """
    name = f"{distribution.metadata['Name']}-{distribution.version}"
    info = f"{name}.dist-info"
    added = {f"{info}/{other}" for other in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    files = [
        path
        for path in (() if distribution.files is None else distribution.files)
        if ".." not in path.parts and "__pycache__" not in path.parts and str(path) not in added
    ]
    if not any(path.name == "WHEEL" for path in files):
        raise PackError(
            f"{name} is not installed from a wheel, and its source is not here",
            hint="pack from the source tree, or from an environment that pip filled",
        )
    place, record = folder / f"{name}-py3-none-any.whl", []
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in files:
            content = distribution.locate_file(path).read_bytes()  # type: ignore[attr-defined]
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            wheel.writestr(str(path), content)
            record.append(f"{path},sha256={digest.decode()},{len(content)}")
        wheel.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,", ""]))
    return place


def _pip(arguments: Sequence[str], links: Path | None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    said = "\n  ".join(told) if told else done.stderr.strip()[-2000:]
    raise PackError(
        f"pip {arguments[0]} failed:\n  {said}",
        hint="without internet here: on a machine that has it, `pip download --dest wheels"
        " sdengine[...] pip setuptools`, then `sdengine pack ... --wheels wheels`"
        if links is None
        else f"put what is missing into {links}: `pip download --dest {links} NAME`",
    )


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _machine() -> str:
    return platform.machine()
