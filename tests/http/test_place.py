"""Workers on devices of their own: what each process is told and sees."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from sdengine import api
from sdengine.engine.errors import RequestError, WorkerLost
from sdengine.serve import pool as pools
from sdengine.serve.child import Child
from sdengine.serve.config import Config
from sdengine.serve.place import placed, read_devices

MODELS = {"emoji": api.EMBEDDED["emoji"]}


@pytest.mark.parametrize(
    ("device", "environ", "expected"),
    [
        (None, {}, ({}, None)),
        ("GPU.1", {}, ({}, "GPU.1")),
        ("cuda", {}, ({}, "cuda")),
        ("cuda:1", {}, ({"CUDA_VISIBLE_DEVICES": "1"}, "cuda:0")),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,6"}, ({"CUDA_VISIBLE_DEVICES": "6"}, "cuda:0")),
        (
            "cuda:0",
            {"CUDA_VISIBLE_DEVICES": "GPU-8b, GPU-9c"},
            ({"CUDA_VISIBLE_DEVICES": "GPU-8b"}, "cuda:0"),
        ),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(device, environ, expected):
    assert placed(device, environ) == expected


@pytest.mark.parametrize(("seen", "left"), [("4,6", 2), ("", 0)])
def test_a_gpu_that_is_not_there(seen, left):
    with pytest.raises(RequestError, match=f"no cuda:2: .* leaves {left} of them") as caught:
        placed("cuda:2", {"CUDA_VISIBLE_DEVICES": seen})
    assert "--device" in caught.value.hint


def test_devices_are_named_with_commas():
    assert read_devices(None) == ()
    assert read_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    with pytest.raises(RequestError, match="names no device") as caught:
        read_devices("cuda:0,")
    assert "cuda:0,cuda:1" in caught.value.hint


def test_each_worker_has_a_device(monkeypatch):
    """More workers than devices share them in turn; one that dies keeps its own."""
    made = []

    class Stub:
        def __init__(self, config):
            made.append(config.engine.device)

        async def start(self):
            await asyncio.Event().wait()

        async def end(self):
            pass

    async def whole():
        pool = pools.Pool(Config(MODELS, workers=3, devices=("cuda:0", "cuda:1")))
        pool.start()
        await asyncio.sleep(0)
        await pool.close(0)

    monkeypatch.setattr(pools, "Child", Stub)
    asyncio.run(whole())
    assert made == ["cuda:0", "cuda:1", "cuda:0"]


def test_what_the_process_is_told_and_sees(tmp_path, monkeypatch):
    """A process of our own notes its environment and the first message."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    note = tmp_path / "note.json"
    program = (
        "import json, os, sys; from sdengine.serve import wire; "
        "said = wire.read(sys.stdin.buffer); "
        f"open({str(note)!r}, 'w').write(json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], "
        "said.fields['engine']['device']]))"
    )
    config = Config(MODELS, devices=("cuda:0", "cuda:1")).of_worker(1)

    async def whole():
        child = Child(config, [sys.executable, "-c", program])
        with pytest.raises(WorkerLost):
            await child.start()
        await child.end()

    asyncio.run(whole())
    assert json.loads(note.read_text()) == ["6", "cuda:0"]
