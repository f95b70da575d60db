"""An export that is killed leaves no folder that opens; the next one cleans up behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import onnx_ir as ir
import pytest

from sdengine.engine.bundle import open_bundle

pytestmark = [pytest.mark.export, pytest.mark.ov, pytest.mark.slow]

MOMENTS = 10

# One process imports torch once and forks an export for each kill. Traces come from files, and
# nobody judges: neither writes anything, and the moments between them are what counts.
SCRIPT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import onnx_ir as ir
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BundleError
from sdengine.export import graphs, run
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.run import export_bundle

source, traces, out = map(Path, sys.argv[1:4])
moments = int(sys.argv[4])
checkpoint = open_checkpoint(source)
graphs.trace = lambda module, spec, **options: ir.load(traces / f"{spec.name}.onnx")

run.judge = lambda *args, **options: []

def start():
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            export_bundle(checkpoint, out, targets=())
            status = 0
        finally:
            os._exit(status)
    return pid

def state():
    if not out.exists():
        return "absent"
    try:
        open_bundle(out, verify=True)
        return "whole"
    except BundleError as error:
        return f"broken: {error}"

began = time.monotonic()
_, status = os.waitpid(start(), 0)
whole = time.monotonic() - began
assert status == 0 and state() == "whole", (status, state())
shutil.rmtree(out)
chance = random.Random(4)
found = []
for _ in range(moments):
    pid = start()
    time.sleep(chance.uniform(0, whole))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found.append((state(), sum(p.name != out.name for p in out.parent.iterdir())))
    shutil.rmtree(out, ignore_errors=True)
_, status = os.waitpid(start(), 0)
left = [p.name for p in out.parent.iterdir()]
print(json.dumps({"kills": found, "status": status, "left": left}))
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9 and no fork on Windows")
def test_killed_at_ten_moments(mini_file, traced, tmp_path):
    for name, model in traced.items():
        ir.save(model, tmp_path / f"{name}.onnx")
    out = tmp_path / "place" / "mini"
    out.parent.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(mini_file), str(tmp_path), str(out), str(MOMENTS)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert len(found["kills"]) == MOMENTS
    assert {state for state, _ in found["kills"]} <= {"absent", "whole"}
    assert any(left for _, left in found["kills"]), "no kill met an export at work"
    assert all(left <= 1 for _, left in found["kills"]), "leftovers pile up"
    assert found["status"] == 0
    assert found["left"] == ["mini"]
    assert open_bundle(out, verify=True).facts.name == "mini"
