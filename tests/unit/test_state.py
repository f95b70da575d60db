"""A stopped run goes on exactly, through a file; what does not belong to it is refused."""

from __future__ import annotations

import errno
import gc
import json
import struct
import weakref
from dataclasses import replace

import numpy as np
import pytest

from sdengine.engine import images, schedule, solvers, state
from sdengine.engine.errors import RequestError, StorageError
from sdengine.engine.loop import denoise
from sdengine.engine.noise import noise_stream
from sdengine.engine.ports import State
from sdengine.engine.schedule import Training

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
SHAPE = (2, 4, 5, 7)
SEEDS = (5, 6)
STEPS = 6


def predict(x, row):
    """Unlike any image, and sensitive to the last bit of x."""
    return np.sin(np.float32(3 + row.t / 1000) * x) + np.float32(0.1) * np.roll(x, 1, axis=-1)


def table_of(sampler, eta=0.0):
    levels = schedule.make("leading", TRAINING, STEPS)
    return solvers.make(sampler, levels, "eps", eta)


RUNS = [(name, 0.0) for name in solvers.SOLVERS]
RUNS += [(name, 1.0) for name, solver in solvers.SOLVERS.items() if solver.eta]


class Run:
    """One run of the loop with its streams; two of them share nothing."""

    def __init__(self, kind="torch", *variation):
        self.streams = [noise_stream(kind, seed, *variation) for seed in SEEDS]

    def noise(self):
        return np.stack([stream.normal(SHAPE[1:]) for stream in self.streams])

    def snapshots(self):
        return [stream.snapshot() for stream in self.streams]


def stopped(table, run, rows):
    """As a caller stops it: what `--save-latents` would write after `rows` rows."""
    for step in denoise(table, predict, run.noise(), run.noise):
        if step.row.index + 1 == rows:
            return state.Saved("b1", {"steps": STEPS}, step.state(), run.snapshots())
    raise AssertionError(f"no row {rows}")


@pytest.mark.parametrize("kind", [("torch",), ("numpy",), ("philox",), ("torch", 9, 0.4)], ids=str)
@pytest.mark.parametrize(("sampler", "eta"), RUNS)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(sampler, eta, kind, tmp_path):
    table, whole = table_of(sampler, eta), Run(*kind)
    steps = list(denoise(table, predict, whole.noise(), whole.noise))
    for rows in range(1, len(table) + 1):
        path = state.save(stopped(table, Run(*kind), rows), tmp_path / f"{rows}.safetensors")
        saved, rest = state.load(path), Run(*kind)
        saved.check(bundle="b1", request={"steps": STEPS}, table=table, shape=SHAPE)
        for stream, place in zip(rest.streams, saved.noise, strict=True):
            stream.restore(place)
        np.testing.assert_array_equal(saved.state.x, steps[rows - 1].x)
        again = list(denoise(table, predict, saved.state, rest.noise))
        assert [s.row for s in again] == [s.row for s in steps[rows:]]
        for got, want in zip(again, steps[rows:], strict=True):
            np.testing.assert_array_equal(got.x, want.x)
            np.testing.assert_array_equal(got.before, want.before)
        assert rest.snapshots() == whole.snapshots()


def test_the_history_matters():
    """The tests above would see a state without it: a multistep solver then ends elsewhere."""
    table, run = table_of("plms"), Run()
    whole = list(denoise(table, predict, run.noise(), run.noise))
    saved = stopped(table, Run(), 4).state
    *_, end = denoise(table, predict, replace(saved, history=0 * saved.history))
    assert np.abs(end.x - whole[-1].x).max() > 1e-3


def test_a_state_is_a_copy():
    table, run = table_of("dpmpp_2m"), Run()
    steps = denoise(table, predict, run.noise())
    next(steps)
    first = next(steps).state()
    before = first.x.copy(), first.history.copy()
    *_, step = steps
    for _ in range(2):
        *_, again = denoise(table, predict, first)
        np.testing.assert_array_equal(again.x, step.x)
    np.testing.assert_array_equal(first.x, before[0])
    np.testing.assert_array_equal(first.history, before[1])


def test_stopping_at_any_step_leaks_nothing():
    """The network is asked no more, and the run's memory is given back at once."""
    calls, table, run = [], table_of("dpmpp_2m"), Run()

    def counted(x, row):
        calls.append(row.index)
        return predict(x, row)

    for rows in range(1, STEPS + 1):
        calls.clear()
        steps = denoise(table, counted, run.noise())
        for _ in range(rows):
            step = next(steps)
        held = [weakref.ref(array) for array in (step.rings, step.before, step.out)]
        gc.disable()
        steps.close()
        del step, steps
        assert [ref() for ref in held] == [None] * 3
        gc.enable()
        assert calls == list(range(rows))


# The file


@pytest.fixture
def saved():
    return stopped(table_of("dpmpp_2m"), Run(), 3)


@pytest.fixture
def file(saved, tmp_path):
    return state.save(saved, tmp_path / "a.safetensors")


def test_other_programs_read_the_file(saved, tmp_path):
    from safetensors import safe_open

    saved = replace(saved, features={"deep": np.arange(6, dtype=np.float32).reshape(2, 3)})
    path = state.save(saved, tmp_path / "new" / "a.safetensors")
    with safe_open(path, "np") as read:
        assert set(read.keys()) == {"x", "history", "feature.deep"}
        np.testing.assert_array_equal(read.get_tensor("x"), saved.state.x)
        np.testing.assert_array_equal(read.get_tensor("history"), saved.state.history)
        np.testing.assert_array_equal(read.get_tensor("feature.deep"), [[0, 1, 2], [3, 4, 5]])
        facts = json.loads(read.metadata()["sdengine.state"])
    assert (facts["rows"], facts["request"], len(facts["noise"])) == (3, {"steps": STEPS}, 2)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_everything_comes_back(saved, tmp_path):
    request = {"prompt": "кот 🐱", "seed": None, "weights": [0.5, -1.0], "eta": 0.1}
    features = {"deep": np.ones((1, 2), np.float32)}
    made = replace(saved, request=request, conditions={"image": "ab" * 32}, features=features)
    got = state.load(state.save(made, tmp_path / "a"))
    assert (got.bundle, dict(got.request), dict(got.conditions)) == (
        "b1",
        request,
        {"image": "ab" * 32},
    )
    assert [dict(n) for n in got.noise] == list(made.noise)
    assert got.state.rows == 3
    np.testing.assert_array_equal(got.features["deep"], features["deep"])
    got.state.x[...] = 0  # the caller's to keep


@pytest.mark.parametrize("place", [0.001, 0.2, 0.4, 0.6, 0.8, 0.999])
def test_a_changed_byte_is_seen(file, place):
    raw = bytearray(file.read_bytes())
    raw[int(place * len(raw))] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StorageError) as caught:
        state.load(file)
    assert "run from the start" in caught.value.hint or "--save-latents wrote" in caught.value.hint


@pytest.mark.parametrize("part", [0, 5, 100, -1])
def test_a_cut_file_is_seen(file, part):
    file.write_bytes(file.read_bytes()[:part])
    with pytest.raises(StorageError, match="is not a sound safetensors file") as caught:
        state.load(file)
    assert "save the latents again" in caught.value.hint


def rewritten(file, change):
    """The file with its JSON changed and nothing else."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["sdengine.state"])
    change(facts)
    header["__metadata__"]["sdengine.state"] = json.dumps(facts)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.update(rows=2), "its hash is not the stored one"),
        (lambda f: f["request"].update(steps=7), "its hash is not the stored one"),
        (lambda f: f["noise"][0].update(pos=0), "its hash is not the stored one"),
        (lambda f: f.update(rows=0), "state.rows.*from 1"),
        (lambda f: f.update(noise=[]), "a list of at least 1"),
        (lambda f: f.update(request=3), "an object, found 3"),
        (lambda f: f.update(extra=1), "unknown key 'extra'"),
        (lambda f: f.pop("bundle"), "the key bundle"),
    ],
)
def test_changed_facts_are_seen(file, change, said):
    with pytest.raises(StorageError, match=f"damaged: .*{said}") as caught:
        state.load(rewritten(file, change))
    assert "run from the start" in caught.value.hint


def test_another_format_is_named(file):
    with pytest.raises(StorageError, match="has format 2; this version reads 1") as caught:
        state.load(rewritten(file, lambda f: f.update(format=2)))
    assert "version of sdengine that saved it" in caught.value.hint


def test_weights_are_no_saved_run(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(StorageError, match=r"has no 'sdengine.state'") as caught:
        state.load(tmp_path / "w.safetensors")
    assert "--save-latents wrote" in caught.value.hint


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="No such file") as caught:
        state.load(tmp_path / "none")
    assert "permissions" in caught.value.hint


def test_a_full_disk_keeps_the_file_that_was_there(saved, file, monkeypatch):
    before = file.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images.os, "replace", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        state.save(replace(saved, bundle="b2"), file)
    assert caught.value.hint
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]


# Whether it belongs to this run


def checked(saved, **other):
    asked = {"bundle": "b1", "request": {"steps": STEPS}, "table": table_of("dpmpp_2m"),
             "shape": SHAPE, **other}  # fmt: skip
    saved.check(**asked)


@pytest.mark.parametrize(
    ("other", "said", "hint"),
    [
        ({"bundle": "b2"}, "of bundle b1; this is b2", "--model the bundle"),
        ({"request": {"steps": 7}}, "steps is 6 there, 7 here", "leave these options out"),
        ({"request": {}}, "steps is 6 there, None here", "leave these options out"),
        (
            {"request": {"steps": 6, "eta": 0.5}},
            "eta is None there, 0.5 here",
            "leave these options",
        ),
        ({"conditions": {"image": "x"}}, "with another image", "the same files"),
        ({"shape": (2, 4, 7, 5)}, r"found x \(2, 4, 5, 7\).* expected x \(2, 4, 7, 5\)", "anew"),
        ({"shape": (1, 4, 5, 7)}, "2 noise streams.* 1 streams", "anew"),
        ({"table": table_of("plms")}, r"history \(4, 280\).*history \(\d+, 280\)", "anew"),
    ],
)
def test_what_does_not_belong_is_refused(saved, other, said, hint):
    checked(saved)
    with pytest.raises(RequestError, match=said) as caught:
        checked(saved, **other)
    assert hint in caught.value.hint


def test_more_rows_than_the_table_has(saved):
    beyond = replace(saved, state=replace(saved.state, rows=STEPS + 1))
    with pytest.raises(RequestError, match=r"7 rows done; .* 1 to 6"):
        checked(beyond)


def test_tuples_of_a_request_are_lists_in_the_file(saved, tmp_path):
    made = replace(saved, request={"weights": (0.5, 0.5)})
    checked(state.load(state.save(made, tmp_path / "a")), request={"weights": (0.5, 0.5)})


@pytest.mark.parametrize("graph", ["shallow", "shallow@int8"])
def test_a_row_that_reuses_features_needs_them(saved, graph):
    graphs = ("full", "full", "full", graph, "full", "full")
    table = replace(table_of("dpmpp_2m"), graphs=graphs)
    with pytest.raises(RequestError, match="row 3 reuses the network's features") as caught:
        checked(saved, table=table)
    assert "before a full network call" in caught.value.hint
    checked(replace(saved, features={"deep": np.zeros(1, np.float32)}), table=table)
    assert not state.needs_features(table, 6)


def test_digests_tell_values_shapes_and_types_apart():
    values = [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), np.float32), np.ones((2, 3))]
    values += ["", "a", b"b", np.zeros((3, 2)).T + np.arange(3)]
    assert len({state.digest(v) for v in values}) == len(values)
    assert state.digest("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    layout = np.arange(6.0).reshape(2, 3)
    assert state.digest(np.asfortranarray(layout)) == state.digest(layout)


def test_the_loop_refuses_a_state_of_another_table(saved):
    with pytest.raises(AssertionError, match="another table"):
        next(denoise(table_of("plms"), predict, State(1, saved.state.x, saved.state.history)))
