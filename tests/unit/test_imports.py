"""What is imported when: the runtime never takes torch along; `import sdengine` costs nothing.

Which module may name which is checked by import-linter (.importlinter); this is about processes.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

RUNTIME = (
    "sdengine",
    "sdengine.api",
    "sdengine.cli",
    "sdengine.backends",
    "sdengine.backends.cache",
    "sdengine.backends.doctor",
    "sdengine.backends.fake",
    "sdengine.backends.onnxruntime",
    "sdengine.backends.openvino",
    "sdengine.engine.describe",
    "sdengine.engine.outputs",
    "sdengine.engine.pipeline",
    "sdengine.serve.batch",
)
EXPORT_ONLY = ("torch", "onnx", "onnx_ir", "onnxscript", "open_clip", "nncf", "safetensors", "yaml")
RIVALS = ("diffusers", "transformers", "optimum")


def loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of these modules a fresh process has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_whole_runtime_takes_nothing_of_the_exporter() -> None:
    code = "\n".join(f"import {name}" for name in RUNTIME)
    assert loaded_after(code, (*EXPORT_ONLY, *RIVALS, "sdengine.export")) == []


def test_import_sdengine_takes_nothing_at_all() -> None:
    names = ("numpy", "PIL", "typer", "rich", "openvino", "sdengine.api", "sdengine.engine")
    assert loaded_after("import sdengine", names) == []


@pytest.mark.parametrize("name", ["load", "Pipeline", "Request"])
def test_the_public_names_are_found_on_first_use(name: str) -> None:
    assert loaded_after(f"import sdengine; sdengine.{name}", ("numpy", "torch")) == ["numpy"]


def test_the_registry_of_backends_imports_no_engine() -> None:
    names = ("openvino", "onnxruntime", "torch")
    assert loaded_after("import sdengine.backends", names) == []


@pytest.mark.parametrize("other", ["onnxruntime", "torch"])
def test_a_backend_takes_no_other_engine(other: str) -> None:
    assert loaded_after("import sdengine; import sdengine.backends.openvino", (other,)) == []


def test_the_check_sees_what_is_loaded() -> None:
    """That the empty lists above are not empty for another reason."""
    assert loaded_after("import json", ("json", "numpy")) == ["json"]
