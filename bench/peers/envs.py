"""Makes the peers' environments: `python -m sdengine.bench.peers.envs HOME [NAME...]`.

Each peer gets the versions that suit it, so that no peer is measured with another's libraries. What
cannot be installed is skipped, and HOME/envs/NAME.failed says why; the rows of its peers show it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import SdengineError
from . import catalogue

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]

# torchvision's compiled operators fit one build of torch; transformers imports it where it lies
NO_VISION = ("torchvision",)


@dataclass(frozen=True)
class Environment:
    """install     arguments of pip
    remove      what comes along and must go
    check       Python that fails when it does not work
    """

    install: tuple[str, ...]
    check: str
    remove: tuple[str, ...] = ()


ENVIRONMENTS: Mapping[str, Environment] = {
    "diffusers": Environment(
        ("torch==2.13.0", "diffusers>=0.35", "transformers>=4.56", "accelerate", "safetensors"),
        "from diffusers import StableDiffusionPipeline",
        NO_VISION,
    ),
    "genai": Environment(
        ("torch==2.13.0", "openvino-genai>=2026.2", "optimum-intel>=2.2", "nncf>=3.0", "diffusers"),
        "import sys; sys.modules['openvino_telemetry'] = None; import openvino_genai",
        NO_VISION,
    ),
    "sdcpp": Environment(
        ("stable-diffusion-cpp-python>=0.4.7",), "from stable_diffusion_cpp import StableDiffusion"
    ),
}


def make(home: Path, names: Sequence[str], run: Run | None = None) -> dict[str, str]:
    """Make what is not there yet; name -> "" or why not. Raises UnknownName.

    run     executes a command (subprocess.run with its output captured)
    """
    execute = _run if run is None else run
    for name in names:
        if name not in ENVIRONMENTS:
            from ...engine.errors import UnknownName

            raise UnknownName("environment", name, ENVIRONMENTS)
    return {name: _make(home / "envs" / name, ENVIRONMENTS[name], execute) for name in names}


def _make(folder: Path, wanted: Environment, run: Run) -> str:
    failed = folder.with_suffix(".failed")
    python = str(folder / catalogue.SCRIPTS / "python")
    if Path(python).exists() and not failed.exists():
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "install", "--quiet", *wanted.install],
        *([[python, "-m", "pip", "uninstall", "--yes", *wanted.remove]] if wanted.remove else []),
        [python, "-c", wanted.check],
    ]
    for step in steps:
        done = run(step)
        if done.returncode != 0:
            failed.write_text(f"{' '.join(step)}\n{done.stderr}", encoding="utf-8")
            return catalogue._last(failed)
    failed.unlink(missing_ok=True)
    return ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when all are there."""
    if not arguments:
        sys.stderr.write("usage: python -m sdengine.bench.peers.envs HOME [NAME...]\n")
        return 2
    home, *names = arguments
    try:
        found = make(Path(home), names if names else list(ENVIRONMENTS))
    except SdengineError as error:
        sys.stderr.write(f"error: {error.message}\n\nhint: {error.hint}\n")
        return error.exit_code
    for name, why in found.items():
        sys.stderr.write(f"{name}: {'ready' if not why else f'skipped: {why}'}\n")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
