"""The command line as a process: start-up, signals, pipes, and what a shell sees."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

INTERRUPTIBLE = [sys.executable, str(Path(__file__).with_name("interruptible.py"))]
STUB = [sys.executable, str(Path(__file__).with_name("stub.py"))]
SDENGINE = [sys.executable, "-c", "from sdengine.cli import main; main()"]
HEAVY = (
    "PIL",
    "diffusers",
    "ftfy",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "rich",
    "tokenizers",
    "torch",
    "transformers",
)

Result = subprocess.CompletedProcess[bytes]


def shell(command: list[str], *arguments: str | bytes, cwd: Path) -> Result:
    return subprocess.run([*command, *arguments], capture_output=True, cwd=cwd, check=False)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, atexit; from sdengine.cli import main\n"
        f"heavy = lambda: [m for m in {HEAVY} if m in sys.modules]\n"
        "atexit.register(lambda: print(heavy(), file=sys.stderr))\n"
        "main()"
    )
    result = shell([sys.executable, "-c", code], "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert b"inspect" in result.stdout
    assert result.stderr == b"[]\n"


def test_help_takes_less_than_three_tenths_of_a_second(tmp_path: Path) -> None:
    """Processor time, the best of five: other programs on the machine do not count."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shell(SDENGINE, "--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_version(tmp_path: Path) -> None:
    from sdengine import __version__

    result = shell(SDENGINE, "--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"sdengine {__version__}\n".encode())


def test_a_run(tmp_path: Path) -> None:
    result = shell(STUB, "quick", "run", "--prompt", "a fox", "--seed", "7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"a-fox.7.png\n"
    assert os.listdir(tmp_path) == ["a-fox.7.png"]


@pytest.mark.parametrize(
    ("mode", "arguments", "status"),
    [
        ("quick", ["run", "--sampler", "dpm"], 2),
        ("quick", ["run", "--colour", "red"], 2),
        ("refuse", ["run"], 1),
        ("crash", ["run"], 1),
        ("quick", ["inspect", "nowhere/at-all"], 1),
    ],
)
def test_the_status_of_a_failure(
    tmp_path: Path, mode: str, arguments: list[str], status: int
) -> None:
    result = shell(STUB, mode, *arguments, cwd=tmp_path)
    assert result.returncode == status
    assert result.stdout == b""
    assert b"Traceback" not in result.stderr


def test_control_c_ends_it_cleanly(tmp_path: Path) -> None:
    """The finished picture stays, nothing half-written does."""
    slow = [*STUB, "slow", "run", "--prompt", "fox", "--seed", "7", "--count", "3"]
    command = [*INTERRUPTIBLE, *slow]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.2)  # into the second picture
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (first, out) == (b"fox.7.png\n", b"")
    assert err.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in err
    assert os.listdir(tmp_path) == ["fox.7.png"]


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*STUB, "quick", "run", "--seed", "7", "-q"]
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, check=False
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_prompt_that_is_not_utf8(tmp_path: Path) -> None:
    result = shell(STUB, "quick", "run", "--prompt", b"caf\xe9", "--seed", "7", cwd=tmp_path)
    assert b"Traceback" not in result.stderr
    assert result.returncode == 2, result.stderr
    assert b"hint: " in result.stderr


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    result = shell(STUB, "quick", "run", "--out", name, "--seed", "7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == name + b"\n"
    assert os.listdir(os.fsencode(tmp_path)) == [name]


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal stderr draws; stdout, a pipe, still gets the path alone."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    controller, terminal = pty.openpty()
    command = [*STUB, "quick", "run", "--prompt", "fox", "--seed", "7"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=terminal, cwd=tmp_path, env=environment, check=False
    )
    os.close(terminal)
    drawn = os.read(controller, 1 << 20).decode()
    os.close(controller)
    assert result.returncode == 0
    assert result.stdout == b"fox.7.png\n"
    assert "picture 1 of 1" in drawn
    assert "100 %" in drawn


def test_exporting_without_the_extra_names_the_command(tmp_path: Path) -> None:
    code = (
        "import sys; from sdengine.cli import main; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        "main()"
    )
    command = [sys.executable, "-c", code]
    result = shell(command, "export", "x.safetensors", "--out", "y", cwd=tmp_path)
    assert result.returncode == 1
    assert b"torch" in result.stderr
    assert b"pip install 'sdengine[export]'" in result.stderr


def test_json_is_clean_when_both_streams_are_one(tmp_path: Path) -> None:
    """`2>&1` puts the timings after the log and before the data, each on lines of its own."""
    command = [*STUB, "quick", "run", "--seed", "7", "--json"]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, check=False
    )
    assert json.loads(result.stdout.splitlines()[-1])["pictures"][0]["seed"] == 7
