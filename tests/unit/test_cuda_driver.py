"""The real device against the real cuda.bindings, whose driver library is a stub of our own.

Each case runs in a process of its own: a driver is loaded once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROW_CU = TESTS.parent / "backends" / "cuda" / "row.cu"


def _absent(what):
    message = f"{what} is not here"
    pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """Folder of a libcuda.so.1 without a GPU behind it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _absent("a C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    options = ["-shared", "-fPIC", "-O1", "-ffp-contract=off", "-Wl,-Bsymbolic"]
    source = str(TESTS / "cuda_stub.cpp")
    subprocess.run(
        [compiler, *options, f'-DROW_CU="{ROW_CU}"', source, "-ldl", "-o", folder / "libcuda.so.1"],
        check=True,
    )
    return folder


def run(program: str, folder: Path | None, **variables) -> str:
    # `cuda` must not be a folder of ours: the interpreter starts elsewhere
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    if folder is not None:
        env["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False,
        cwd=ROW_CU.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


if find_spec("cuda") is None and os.environ.get("CI") != "true":
    pytest.skip("cuda.bindings is not here", allow_module_level=True)

TABLE = """
import numpy as np
from sdengine.backends.cuda.board import TableBoard
from sdengine.backends.cuda.device import Buffer, Lane
from sdengine.backends.cuda.driver import Driver
from sdengine.backends.denoise import denoise
from sdengine.engine import loop, schedule, solvers
from sdengine.engine.noise import noise_stream
from sdengine.engine.ports import Job, State
from sdengine.engine.schedule import Training
from sdengine.engine.spec import ComponentSpec, TensorSpec

device = Driver()
print(device.facts())
spec = ComponentSpec("unet", (TensorSpec("sample", "float32", ("B", 4, "h", "w")),
                              TensorSpec("timestep", "float32", ("B",))),
                     (TensorSpec("out_sample", "float32", ("B", 4, "h", "w")),))

class Same:
    "A network that answers what it is given."
    spec = spec
    def place(self, shapes):
        self.size = 4 * int(np.prod(shapes["sample"]))
        names = ("sample", "timestep", "out_sample")
        self.at = {n: Buffer(device, self.size) for n in names}
    def address(self, name): return self.at[name].address
    def enqueue(self, lane):
        device.copy(self.address("out_sample"), self.address("sample"), self.size, lane.stream)
    def capturable(self, lane): return True

levels = schedule.make("linspace", Training.scaled_linear(0.00085, 0.012, 1000), 20)
table = solvers.make("euler_a", levels, "v").guided(3.0)
x = np.random.default_rng(0).standard_normal((2, 4, 9, 11)).astype(np.float32)
def noise():
    stream = noise_stream("torch", 1)
    return lambda: stream.normal(x.shape)
job = Job(table, State.fresh(table, x), ("both",), {("both", "full"): None}, None, noise(), None)
lane = Lane(device)
*_, step = denoise(job, TableBoard(lane, job, {("both", "full"): Same()}))
*_, wanted = loop.denoise(table, lambda x, row: x + 3.0 * (x - x), x, noise())
print("apart", float(np.abs(step.x - wanted.x).max()), float(np.abs(wanted.x).max()))
lane.close()
"""


def test_a_table_runs_through_the_real_bindings(stub):
    out = run(TABLE, stub)
    facts, apart = out.strip().splitlines()
    assert "name='Stub GPU', capability=(9, 0), driver=(12, 4)" in facts
    _, difference, size = apart.split()
    assert float(size) > 0.1
    assert float(difference) < 1e-5 * float(size)


ERROR = """
from sdengine.backends.cuda.driver import Driver
from sdengine.engine.errors import SdengineError
try:
    device = Driver({index})
    device.allocate(1 << 22)
except SdengineError as error:
    print(type(error).__name__, "|", error.message, "|", error.hint)
"""


@pytest.mark.parametrize(
    ("variables", "index", "said"),
    [
        (
            {"STUB_DRIVER": "11080"},
            0,
            ("BackendUnavailable", "it speaks CUDA 11.8", "525"),
        ),
        ({"STUB_GPUS": "0"}, 0, ("BackendUnavailable", "CUDA_ERROR_NO_DEVICE", "nvidia-smi")),
        ({}, 3, ("BackendUnavailable", "no cuda:3: 1 GPUs", "CUDA_VISIBLE_DEVICES")),
        (
            {"STUB_FREE": "1048576"},
            0,
            ("BackendError", "4 MiB: 1 of 8192 MiB", "batch"),
        ),
    ],
)
def test_what_is_wrong_with_a_gpu(variables, index, said, stub):
    out = run(ERROR.format(index=index), stub, **variables)
    for part in said:
        assert part in out


def test_no_driver():
    out = run(ERROR.format(index=0), None, LD_LIBRARY_PATH="")
    if not out:
        pytest.skip("there is a driver on this machine")
    assert "there is no NVIDIA driver" in out
    assert "--gpus all" in out
