"""Malformed requests, made by schemathesis from our own OpenAPI: no 5xx, no hang, JSON always.

bench/serve_fuzz.py runs a thousand of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "bench" / "serve_fuzz.py"


def test_malformed_requests(fake):
    command = [sys.executable, str(FUZZ), "--url", fake.url, "--requests", "80"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 wrong" in found.stdout
