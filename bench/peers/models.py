"""One checkpoint in the forms that the peers read:
`python -m sdengine.bench.peers.models HOME CHECKPOINT [FORM...]`.

HOME/models/FORM is made by a script in the environment of the peer that reads it; what fails leaves
HOME/models/FORM.failed with the reason, and the rows of its peers show it. The weights are the
checkpoint's own everywhere, so that all engines compute the same network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import SdengineError, UnknownName
from . import catalogue
from .envs import _run

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Form:
    """environment  whose Python makes it
    script       beside this file; its arguments are: what it is made of, where it goes, then these
    source       the form that it is made of; None: the checkpoint
    """

    environment: str
    script: str
    arguments: tuple[str, ...] = ()
    source: str | None = None


FORMS: Mapping[str, Form | None] = {
    "checkpoint": None,  # a link to the file itself
    "diffusers": Form("diffusers", "make_diffusers.py"),
    "openvino": Form("genai", "make_openvino.py", ("fp16",), "diffusers"),
    "openvino-int8-weights": Form("genai", "make_openvino.py", ("int8",), "diffusers"),
    "openvino-int8-hybrid": Form("genai", "make_openvino.py", ("hybrid",), "openvino"),
    "openvino-int8-full": Form("genai", "make_openvino.py", ("full",), "openvino"),
}


def make(home: Path, checkpoint: Path, names: Sequence[str], run: Run = _run) -> dict[str, str]:
    """Make what is not there yet, sources first; name -> "" or why not. Raises UnknownName."""
    for name in names:
        if name not in FORMS:
            raise UnknownName("form of a model", name, FORMS)
    found: dict[str, str] = {}
    for name in names:
        _make(home, checkpoint, name, run, found)
    return {name: found[name] for name in names}


def _make(home: Path, checkpoint: Path, name: str, run: Run, found: dict[str, str]) -> None:
    if name in found:
        return
    form, place = FORMS[name], home / "models" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    failed = place.with_name(f"{name}.failed")
    if form is None:
        link = place.with_name(name + checkpoint.suffix)
        if not link.exists():
            link.symlink_to(checkpoint.resolve())
        found[name] = ""
        return
    source = checkpoint
    if form.source is not None:
        _make(home, checkpoint, form.source, run, found)
        source = place.with_name(form.source)
        if found[form.source]:
            found[name] = f"it is made of {form.source}: {found[form.source]}"
            failed.write_text(found[name], encoding="utf-8")
            return
    if place.exists():
        found[name] = ""
        return
    python = home / "envs" / form.environment / catalogue.SCRIPTS / "python"
    beside = place.with_name(f".{name}.part")
    script = str(catalogue.HERE / form.script)
    try:
        done = run([str(python), "-P", script, str(source), str(beside), *form.arguments])
        why = "" if done.returncode == 0 else f"status {done.returncode}: {_last_line(done.stderr)}"
    except OSError as error:
        why = f"{python} cannot be run: {error.strerror}; make it with peers.envs"
    if why:
        failed.write_text(why, encoding="utf-8")
    else:
        failed.unlink(missing_ok=True)
        os.replace(beside, place)
    found[name] = why


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when all are there."""
    if len(arguments) < 2:
        sys.stderr.write("usage: python -m sdengine.bench.peers.models HOME CHECKPOINT [FORM...]\n")
        return 2
    home, checkpoint, *names = arguments
    try:
        found = make(Path(home), Path(checkpoint), names if names else list(FORMS))
    except SdengineError as error:
        sys.stderr.write(f"error: {error.message}\n\nhint: {error.hint}\n")
        return error.exit_code
    for name, why in found.items():
        sys.stderr.write(f"{name}: {'ready' if not why else f'skipped: {why}'}\n")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
