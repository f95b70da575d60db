"""Torch pickles: read where they hold tensors, refused, unrun, where they ask for more."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
import torch

from sdengine.engine.errors import NotACheckpoint, UnsafeCheckpoint
from sdengine.export.checkpoint import open_checkpoint
from sdengine.export.pickles import read_pickle

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def state(base_arrays):
    return {name: torch.from_numpy(array) for name, array in base_arrays.items()}


def placed(base, path):
    """The path, with the small model's sidecar beside it."""
    shutil.copy(base.with_suffix(".yaml"), path.with_suffix(".yaml"))
    return path


def same(checkpoint, state):
    assert checkpoint.kind == "ckpt"
    for name, ref in checkpoint.tensors.items():
        assert torch.equal(ref.torch(), state[name]), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_state_dict_is_unwrapped_as_often_as_it_is_nested(base, state, tmp_path, zipped, depth):
    content = state
    for _ in range(depth):
        content = {"state_dict": content, "global_step": 875000}
    path = placed(base, tmp_path / "model.ckpt")
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    same(open_checkpoint(path), state)


def test_the_generator_s_own_ckpt_equals_its_safetensors(make_checkpoint):
    pickled = open_checkpoint(make_checkpoint("base", suffix=".ckpt"))
    mapped = open_checkpoint(make_checkpoint("base"))
    assert pickled.configs == mapped.configs
    assert list(pickled.tensors) == list(mapped.tensors)
    for name, ref in mapped.tensors.items():
        assert pickled.tensors[name].dtype == ref.dtype
        assert bytes(pickled.tensors[name].numpy_bytes()) == bytes(ref.numpy_bytes()), name


def test_views_and_parameters_are_read_as_they_look(tmp_path):
    """A transposed view of a larger storage, a Parameter, a scalar."""
    whole = torch.arange(24.0).reshape(4, 6)
    content = {
        "view": whole.t()[1:3],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(1.5),
        "step": 7,
    }
    torch.save(content, tmp_path / "a.pt")
    refs = read_pickle(tmp_path / "a.pt")
    assert set(refs) == {"view", "parameter", "scalar"}
    assert torch.equal(refs["view"].torch(), whole.t()[1:3])
    assert bytes(refs["view"].numpy_bytes()) == whole.t()[1:3].contiguous().numpy().tobytes()
    assert refs["scalar"].shape == ()


def test_what_training_leaves_beside_the_weights_is_read_over(base, state, tmp_path, monkeypatch):
    """Lightning keys its callbacks by class. The class is neither imported nor made."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    lightning = types.ModuleType(name)

    class ModelCheckpoint:
        def __init__(self):
            self.best = 1.0

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    lightning.ModelCheckpoint = ModelCheckpoint
    parts = name.split(".")
    with monkeypatch.context() as patch:
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, lightning)
        path = placed(base, tmp_path / "trained.ckpt")
        torch.save(
            {
                "state_dict": state,
                "callbacks": {ModelCheckpoint: {"best": 0.1}, "other": ModelCheckpoint()},
                "optimizer_states": [{"state": {}}],
            },
            path,
        )
    assert name not in sys.modules
    same(open_checkpoint(path), state)
    assert name not in sys.modules


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


class HostileExec(Hostile):
    def __reduce__(self):
        return exec, (f"open({self.flag!r}, 'w').close()",)


class HostileState(Hostile):
    """Asks for a harmless class and feeds it through __setstate__'s back door."""

    def __reduce__(self):
        return subprocess.Popen, (["touch", self.flag],)


def hostile_files(flag, tmp_path):
    """Every container a pickle comes in, every place in it."""
    for kind in (Hostile, HostileExec, HostileState):
        for zipped in (True, False):
            for content in (kind(flag), {"state_dict": {"a": torch.ones(2), "b": kind(flag)}}):
                path = tmp_path / "hostile.ckpt"
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
                yield path
        for protocol in range(2, 6):  # a bare pickle, as pickle itself writes it
            path = tmp_path / "bare.pt"
            path.write_bytes(pickle.dumps(kind(flag), protocol=protocol))
            yield path
        path = tmp_path / "zipped.ckpt"  # an archive made by hand
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(kind(flag), protocol=2))
            archive.writestr("archive/version", "3\n")
        yield path


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    flag = tmp_path / "it_ran"
    count = 0
    for path in hostile_files(flag, tmp_path):
        with pytest.raises(UnsafeCheckpoint) as caught:
            open_checkpoint(path)
        assert "nothing of it was run" in caught.value.message
        assert ".safetensors" in caught.value.hint
        assert not flag.exists(), path
        count += 1
    assert count == 27
    # The test itself can see a file that does run.
    pickle.loads(pickle.dumps(HostileExec(flag)))
    assert flag.exists()


def test_the_refusal_names_what_was_asked_for(tmp_path):
    torch.save({"state_dict": Hostile(tmp_path / "x")}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeCheckpoint, match=r"asks for (posix|nt)\.system"):
        open_checkpoint(tmp_path / "a.ckpt")


def test_protocol_zero_is_no_checkpoint(tmp_path):
    flag = tmp_path / "it_ran"
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Hostile(flag), protocol=0))
    with pytest.raises(NotACheckpoint, match="neither a safetensors file nor a torch pickle"):
        open_checkpoint(tmp_path / "old.ckpt")
    assert not flag.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_every_cut_of_a_pickle_is_refused(tmp_path, zipped):
    buffer = io.BytesIO()
    torch.save(
        {"state_dict": {"a": torch.ones(4000)}}, buffer, _use_new_zipfile_serialization=zipped
    )
    whole = buffer.getvalue()
    path = tmp_path / "cut.ckpt"
    for length in [2, 3, 10, 30, 100, 300, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises((NotACheckpoint, UnsafeCheckpoint)) as caught:
            open_checkpoint(path)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "without a single named tensor"),
        ([1, 2], "without a single named tensor"),
        (torch.ones(3), "without a single named tensor"),
        ({"a": torch.ones(3).to_sparse()}, "sparse"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_pickles_without_a_model(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NotACheckpoint, match=message) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert caught.value.hint


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(NotACheckpoint, match="not a sound torch file") as caught:
        open_checkpoint(tmp_path / "photos.zip")
    assert "damaged or truncated" in caught.value.hint


def test_torchscript_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("archive/code/__torch__.py", "")
        archive.writestr("archive/version", "3\n")
    with pytest.raises((NotACheckpoint, UnsafeCheckpoint)) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert caught.value.hint
