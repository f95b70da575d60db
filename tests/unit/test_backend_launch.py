"""The launcher for Intel processors, on made-up systems; once for real, with a made-up numactl."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdengine.backends import launch
from sdengine.backends.machine import Plan
from sdengine.engine.errors import UnknownName

ONE_NODE = Plan(2, (0, 1), False, True, False, None, {})
TWO_NODES = Plan(4, (0, 1, 2, 3), True, True, False, None, {})


@pytest.fixture
def system(tmp_path):
    """`system("usr/lib/libx.so")`: files that are installed; (root, prefix)."""

    def install(*files):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        return tmp_path, tmp_path / "venv"

    return install


def test_nothing_is_there(system):
    found = launch.intel({"PATH": "", "OMP_NUM_THREADS": "2"}, *system(), TWO_NODES, "torch")
    assert (found.env, found.prefix) == ({}, ())
    assert [line for line in found.said if "install" in line] == [
        "no tcmalloc or jemalloc: apt-get install libjemalloc2",
        "no libiomp5: pip install intel-openmp",
        "no numactl: apt-get install numactl",
    ]


def test_all_of_it_is_there(system):
    root, prefix = system(
        "usr/lib/x86_64-linux-gnu/libjemalloc.so.2", "venv/lib/libiomp5.so", "bin/numactl"
    )
    found = launch.intel({"PATH": str(root / "bin")}, root, prefix, TWO_NODES, "torch")
    assert found.env == {
        "LD_PRELOAD": f"{root}/usr/lib/x86_64-linux-gnu/libjemalloc.so.2:{prefix}/lib/libiomp5.so",
        # the reference's README, "Intel CPU"
        "MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto,"
        "dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "KMP_BLOCKTIME": "1",
        "OMP_NUM_THREADS": "4",
    }
    assert found.prefix == (f"{root}/bin/numactl", "--physcpubind=0,1,2,3", "--localalloc")
    assert not any("install" in line for line in found.said)


def test_one_node_needs_no_numactl(system):
    root, prefix = system("bin/numactl")
    found = launch.intel({"PATH": str(root / "bin")}, root, prefix, ONE_NODE, "torch")
    assert found.prefix == ()
    assert not any("numactl" in line for line in found.said)


def test_tcmalloc_goes_first_and_takes_no_settings_of_jemalloc(system):
    files = ("usr/lib/libjemalloc.so", "usr/lib64/libtcmalloc.so.4", "usr/lib64/libtcmalloc.so")
    root, prefix = system(*files)
    found = launch.intel({}, root, prefix, ONE_NODE, "torch")
    assert found.env["LD_PRELOAD"] == f"{root}/usr/lib64/libtcmalloc.so"
    assert "MALLOC_CONF" not in found.env


def test_what_the_user_has_set_stays(system):
    root, prefix = system("usr/lib/libjemalloc.so", "venv/lib/libiomp5.so")
    given = {"LD_PRELOAD": "/opt/libtcmalloc.so", "OMP_NUM_THREADS": "7", "KMP_BLOCKTIME": "0"}
    found = launch.intel(given, root, prefix, ONE_NODE, "torch")
    assert found.env == {
        "LD_PRELOAD": f"{prefix}/lib/libiomp5.so:/opt/libtcmalloc.so",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
    }


def test_an_unknown_launch():
    with pytest.raises(UnknownName, match="unknown launch 'intl'") as caught:
        launch.again("intl")
    assert "'intel'" in caught.value.hint


def test_nothing_to_set_starts_nothing(monkeypatch):
    monkeypatch.setattr(launch, "intel", lambda *_: launch.Launch({}, (), ("no jemalloc",)))
    monkeypatch.delenv(launch.DONE, raising=False)
    assert launch.again("intel") == ["no jemalloc"]


PROGRAM = """
import os, sys
from sdengine.backends import launch
launch.intel = lambda *_: launch.Launch({"OMP_NUM_THREADS": "5"}, (sys.argv[1], "-x"), ("five",))
launch.again("intel")
print(os.environ["OMP_NUM_THREADS"], os.environ["WRAPPED"], sys.argv[2:])
"""


def test_the_same_command_starts_once_more(tmp_path):
    """Behind a made-up numactl, with the variables, and not a third time."""
    wrapper = tmp_path / "numactl"
    wrapper.write_text('#!/bin/sh\n[ "$1" = -x ] && shift\nWRAPPED=${WRAPPED}1 exec "$@"\n')
    wrapper.chmod(0o755)
    command = [sys.executable, "-c", PROGRAM, str(wrapper), "a b", "c"]
    env = {k: v for k, v in os.environ.items() if k not in ("WRAPPED", launch.DONE)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "5 1 ['a b', 'c']\n"
    assert done.stderr == "launch: five\n"


@pytest.mark.parametrize("backend", [None, "openvino"])
def test_openvino_keeps_its_allocator(backend, system):
    """It ends with "free(): invalid pointer" under another."""
    root, prefix = system("usr/lib/libtcmalloc.so", "venv/lib/libiomp5.so")
    found = launch.intel({}, root, prefix, ONE_NODE, backend)
    assert found.env["LD_PRELOAD"] == f"{prefix}/lib/libiomp5.so"
    assert "no allocator" in found.said[0]
    assert "--backend torch or ipex or onnxruntime" in found.said[0]
