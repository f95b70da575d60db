"""Without the extra, exporting says what is missing; importing the package costs nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from sdengine import export
from sdengine.engine.errors import MissingExtra


def test_missing_packages_are_named_with_the_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda n: None if n in ("torch", "onnx_ir") else real(n)
    )
    with pytest.raises(MissingExtra, match="torch, onnx-ir, not installed") as error:
        _ = export.export_bundle
    assert error.value.hint == "pip install 'sdengine[export]'"


def test_importing_the_package_imports_no_torch():
    script = "import sys, sdengine.export; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


WITHOUT_ONNXRUNTIME = """
import sys
sys.modules["onnxruntime"] = None  # what Python takes as "not there"
from sdengine import export
from sdengine.engine.errors import MissingExtra
for name in export._HOMES:
    getattr(export, name)
from sdengine.export.targets.tensorrt import Emulated, library
assert not Emulated().probe().ok
try:
    library()
except MissingExtra as error:
    print(error.message, error.hint, sep="; ")
"""


def test_exporting_does_without_onnxruntime_which_the_extra_does_not_have():
    command = [sys.executable, "-c", WITHOUT_ONNXRUNTIME]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == "the package onnxruntime is not installed; pip install 'onnxruntime>=1.22'\n"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = export.nothing
