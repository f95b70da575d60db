"""Installs a pack on a box without internet: `python3 box.pyz`, or `python3 install.py` beside an
unpacked .tar. It goes into the pack as it stands here: nothing but the standard library.

    PREFIX/models/NAME      the bundle, read-only
    PREFIX/env-ID           a virtual environment of this pack; env-ID-again where the first runs
    PREFIX/bin/sdengine     a link into it, replaced in one step: an update is all or nothing
    PREFIX/share            the systemd unit, which names this prefix and this bundle

checked by  tests/serve/test_pack.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK = 2**20
FACTS = "pack.json"
LOCK = 0o444, 0o555  # of files, of folders
UMASK = 0o022  # root's may be 077: the unit's user could not enter
UNIT = "sdengine.service"


class Trouble(Exception):
    """What is wrong, and what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Pack:
    """The files of a pack: of a .pyz, which is a zip, or of a folder."""

    def __init__(self, place: Path) -> None:
        self._zip = zipfile.ZipFile(place) if zipfile.is_zipfile(place) else None
        self._folder = place if place.is_dir() else place.parent
        with self.open(FACTS) as stream:
            self.facts: dict[str, Any] = json.loads(stream.read())

    def open(self, name: str) -> BinaryIO:
        if self._zip is not None:
            return cast("BinaryIO", self._zip.open(name))
        return open(self._folder / name, "rb")

    def unpack(self, inside: str, to: Path) -> None:
        """All files below `inside`, each compared with its hash. Raises Trouble."""
        for name, known in self.facts["files"].items():
            if not name.startswith(f"{inside}/"):
                continue
            place = to / name[len(inside) + 1 :]
            place.parent.mkdir(parents=True, exist_ok=True)
            if self._copy(name, place) != known["sha256"]:
                raise Trouble(
                    f"{name} of the pack is damaged: its SHA-256 is not the one of {FACTS}",
                    "copy the pack again, or make it again with `sdengine pack`",
                )

    def _copy(self, name: str, place: Path) -> str:
        found = hashlib.sha256()
        with self.open(name) as source, open(place, "wb") as stream:
            while chunk := source.read(CHUNK):
                found.update(chunk)
                stream.write(chunk)
        return found.hexdigest()


def main(arguments: list[str] | None = None, place: Path | None = None) -> int:
    """`place` is the .pyz or the folder; without it, where this file is."""
    parser = argparse.ArgumentParser(description="Install sdengine and its model; no network.")
    parser.add_argument("--prefix", type=Path, default=Path("/opt/sdengine"))
    parser.add_argument("--facts", action="store_true", help="say what is in the pack, and end")
    parser.add_argument("--no-check", action="store_true", help="make no picture at the end")
    asked = parser.parse_args(arguments)
    here = Path(sys.argv[0]) if place is None else place
    before = os.umask(UMASK)
    try:
        pack = Pack(here)
        if asked.facts:
            say({name: v for name, v in pack.facts.items() if name != "files"})
            return 0
        install(pack, asked.prefix.absolute(), check=not asked.no_check)
    except Trouble as trouble:
        sys.stderr.write(f"error: {trouble}\n\nhint: {trouble.hint}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error}\n\nhint: check space and permissions below --prefix\n")
        return 1
    finally:
        os.umask(before)
    return 0


def install(pack: Pack, prefix: Path, *, check: bool) -> None:
    """Raises Trouble, OSError. What runs from an earlier pack is untouched until all is there."""
    facts = pack.facts
    check_machine(facts)
    prefix.mkdir(parents=True, exist_ok=True)
    check_room(facts, prefix)
    model = prefix / "models" / facts["bundle"]["name"]
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=prefix) as scratch:
        place_model(pack, Path(scratch), model)
        wheels = Path(scratch) / "wheels"
        pack.unpack("wheels", wheels)
        environment = make_environment(facts, prefix, wheels)
        pack.unpack("share", Path(scratch) / "share")
        if check:
            check_picture(environment, model)
        place_unit(Path(scratch) / "share" / UNIT, prefix, model)
    binaries = prefix / "bin"
    binaries.mkdir(exist_ok=True)
    fresh = binaries / ".sdengine"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path("..") / environment.name / "bin" / "sdengine")
    os.replace(fresh, binaries / "sdengine")
    say({"sdengine": str(binaries / "sdengine"), "model": str(model)})


def check_machine(facts: dict[str, Any]) -> None:
    """The wheels hold machine code for one Python and one processor."""
    own = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
    }
    wrong = [f"{name} is {v}, not {facts[name]}" for name, v in own.items() if v != facts[name]]
    if wrong:
        raise Trouble(
            f"this pack is for another box: {', '.join(wrong)}",
            f"start it with python{facts['python']}, or make one: sdengine pack MODEL --python"
            f" {own['python']} --machine {own['machine']}",
        )


def check_room(facts: dict[str, Any], prefix: Path) -> None:
    free = shutil.disk_usage(prefix).free
    needed = facts["installed_bytes"]
    if free < needed:
        raise Trouble(
            f"{prefix} has {free // 2**20} MiB free; {needed // 2**20} are needed",
            "free some space, or name another disk: --prefix",
        )


def place_model(pack: Pack, scratch: Path, model: Path) -> None:
    """The bundle, unless this very one is there."""
    manifest = model / "manifest.json"
    known = pack.facts["files"]["bundle/manifest.json"]["sha256"]
    if manifest.is_file():
        if hashlib.sha256(manifest.read_bytes()).hexdigest() == known:
            return
        raise Trouble(
            f"another bundle is at {model}",
            f"move it away, or choose another name: sdengine pack ... --name {model.name}-2",
        )
    pack.unpack("bundle", scratch / "bundle")
    for place in (scratch / "bundle").rglob("*"):
        place.chmod(LOCK[place.is_dir()])
    model.parent.mkdir(exist_ok=True)
    os.replace(scratch / "bundle", model)
    model.chmod(LOCK[True])


def make_environment(facts: dict[str, Any], prefix: Path, wheels: Path) -> Path:
    """A virtual environment with what the wheels hold; pip itself is one of them."""
    environment = prefix / f"env-{facts['id'][:12]}"
    live = (prefix / "bin" / "sdengine").resolve()
    if live.is_relative_to(environment.resolve()):  # this very pack is what runs
        environment = environment.with_name(f"{environment.name}-again")
    shutil.rmtree(environment, ignore_errors=True)  # half of an earlier try
    call([sys.executable, "-m", "venv", "--without-pip", str(environment)], "making it")
    pip = next(wheels.glob("pip-*.whl"))
    command = [str(environment / "bin" / "python"), f"{pip}/pip", "install", "--quiet"]
    options = ["--no-index", "--no-cache-dir", "--disable-pip-version-check", "--find-links"]
    call([*command, *options, str(wheels), facts["requirement"]], "filling it")
    return environment


def place_unit(unit: Path, prefix: Path, model: Path) -> None:
    """With the real places in it (`%` is systemd's own sign), replaced in one step."""
    text = unit.read_text()
    for known, real in (("models/emoji", f"models/{model.name}"), ("/opt/sdengine", str(prefix))):
        text = text.replace(known, real.replace("%", "%%"))
    unit.write_text(text)
    place = prefix / "share" / UNIT
    place.parent.mkdir(exist_ok=True)
    os.replace(unit, place)


def check_picture(environment: Path, model: Path) -> None:
    """One step of one picture: engine, model and processor fit together."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(environment / "bin" / "sdengine"), "run", "--quiet", "--steps", "1"]
        call([*command, "--model", str(model), "--out", f"{folder}/x.png"], "a first picture")


def call(command: list[str], what: str) -> None:
    """Raises Trouble with what it said."""
    unset = ("PYTHONPATH", "PYTHONHOME", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip()
        raise Trouble(
            f"the environment: {what} failed with status {done.returncode}: {told[-2000:]}",
            f"to see it again: {' '.join(command)}",
        )


def say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    sys.exit(main())
