"""A table on a device equals engine.loop.denoise, and the host waits for nothing.

The device is one of host memory (tests/fake_cuda.py) whose kernels are those of row.cu, compiled
for this processor. The reference is Guidance and the loop, on the same networks as functions.
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sdengine.backends.cuda.board import STAGED, TableBoard
from sdengine.backends.cuda.device import Buffer, Lane
from sdengine.backends.denoise import denoise
from sdengine.engine import loop, presets, schedule, solvers
from sdengine.engine.columns import guided_between
from sdengine.engine.errors import BackendError, NumericsError
from sdengine.engine.guidance import Conditions, Guidance
from sdengine.engine.noise import noise_stream
from sdengine.engine.ports import Blend, Job, State
from sdengine.engine.schedule import Training
from sdengine.engine.spec import ComponentSpec, TensorSpec

from ..fake_cuda import FakeDevice, view

TRAINING = Training.scaled_linear(0.00085, 0.012, 1000)
C, H, W, JOINED = 4, 3, 5, 2
STEPS = 7


def network(graph, sample, times, text, features=None, nan_below=-1.0):
    """Unlike any image, and sensitive to all that it is given: outputs in the graph's order."""
    t = (times / np.float32(1000))[:, None, None, None]
    x, beside = sample[:, :C], sample[:, C:]
    deep = np.cos(np.float32(2) * x + text[:, None, None, None])
    if graph.startswith("shallow"):
        deep = features
    out = x * np.float32(0.95) + np.float32(0.05) * np.sin((3 + t) * x) + np.float32(0.02) * deep
    if beside.size:
        out = out + np.float32(0.1) * beside.mean(axis=1, keepdims=True)
    out = np.where(t < nan_below, np.float32("nan"), out).astype(sample.dtype)
    return [out, deep] if graph.startswith("deep") else [out]


def spec_of(graph, joined):
    sample = TensorSpec("sample", "float32", ("B", C + joined, "h", "w"))
    inputs = [sample, TensorSpec("timestep", "float32", ("B",))]
    outputs = [TensorSpec("out_sample", "float32", ("B", C, "h", "w"))]
    features = TensorSpec("features0", "float32", ("B", C, "h", "w"))
    if graph.startswith("shallow"):
        inputs.append(features)
    if graph.startswith("deep"):
        outputs.append(features)
    return ComponentSpec("unet", tuple(inputs), tuple(outputs))


class HostSession:
    """The network as a session: what Guidance opens."""

    def __init__(self, joined, text=None, graph="full", nan_below=-1.0):
        self.joined, self.text, self.name, self.nan_below = joined, text, graph, nan_below
        self.spec = spec_of(graph, joined)

    def bind(self, held):
        text = held["encoder_hidden_states"].mean(axis=(1, 2))
        return HostSession(self.joined, text, nan_below=self.nan_below)

    def graph(self, name):
        return HostSession(self.joined, self.text, name, self.nan_below)

    def __call__(self, feeds):
        feeds = dict(feeds)
        values = network(
            self.name, feeds.pop("sample"), feeds.pop("timestep"), self.text,
            *feeds.values(), nan_below=self.nan_below,
        )  # fmt: skip
        return dict(zip((t.name for t in self.spec.outputs), values, strict=True))


class Runner:
    """The same in device memory, as backends/cuda/engines.py makes one of a TensorRT engine."""

    def __init__(self, device, session, capturable=True):
        self.device, self.session, self.spec = device, session, session.spec
        self.able = capturable
        self.shapes, self.buffers, self.at = {}, {}, {}

    def place(self, shapes):
        rows = shapes["sample"][0]
        self.shapes = {**shapes, **{t.name: (rows, C, H, W) for t in self.spec.outputs}}
        for name, shape in self.shapes.items():
            self.buffers[name] = Buffer(self.device, 4 * int(np.prod(shape)))
            self.at[name] = self.buffers[name].address

    def address(self, name):
        return self.buffers[name].address

    def point(self, name, address):
        self.at[name] = address

    def enqueue(self, lane):
        lane.scratch(1000)
        at, shapes = dict(self.at), self.shapes

        def work():
            feeds = {t.name: view(at[t.name], shapes[t.name]).copy() for t in self.spec.inputs}
            for name, value in self.session(feeds).items():
                view(at[name], shapes[name])[...] = value

        self.device.enqueue(("network", self.session.name), work)

    def capturable(self, lane):
        return self.able


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def device(built):
    return FakeDevice(built)


class Case:
    """One run, for the loop and for the device."""

    def __init__(self, table, batch=2, halves="together", joined=0, blend=False, nan_below=-1.0):
        self.table, self.batch, self.joined = table, batch, joined
        random = np.random.default_rng(3)

        def draw(*shape):
            return random.standard_normal(shape).astype(np.float32)

        self.x, self.uncond, self.cond = draw(batch, C, H, W), draw(batch, 2, 6), draw(batch, 2, 6)
        self.channels = draw(batch, joined, H, W) if joined else None
        rows = len(table)
        self.blend = (
            Blend(
                (draw(1, H, W) > 0).astype(np.float32), draw(batch, C, H, W), draw(batch, C, H, W),
                table.alphas[1:].astype(np.float32), table.sigmas[1:].astype(np.float32),
            )
            if blend else None
        )  # fmt: skip
        assert rows == len(table)
        self.halves, self.nan_below = halves, nan_below

    def guidance(self):
        opened = HostSession(self.joined, nan_below=self.nan_below)
        conditions = Conditions(self.channels)
        return Guidance(
            lambda *_, **__: opened, self.uncond, self.cond, conditions, halves=self.halves
        )  # fmt: skip

    def noise(self):
        stream = noise_stream("torch", 5)
        return lambda: stream.normal((self.batch, C, H, W))

    def wanted(self, start=None):
        settle = None if self.blend is None else partial(_settled, self.blend)
        begin = self.x if start is None else start
        return loop.denoise(self.table, self.guidance(), begin, self.noise(), settle)

    def rounding(self):
        """How far the loop itself is from the loop in float64, at each row, as a share of x."""
        settle = None if self.blend is None else partial(_settled, self.blend)
        double = self.x.astype(np.float64)
        exact = loop.denoise(self.table, self.guidance(), double, self.noise(), settle)
        pairs = zip(self.wanted(), exact, strict=True)
        apart = max(np.abs(a.x - b.x).max() / max(1.0, np.abs(b.x).max()) for a, b in pairs)
        assert apart < 1e-3, "a case whose own rounding hides faults shows nothing"
        return float(apart)

    def job(self, start=None):
        state = State.fresh(self.table, self.x) if start is None else start
        guidance = self.guidance()
        sessions = guidance.sessions(self.table, state)
        return Job(
            self.table, state, guidance.guided, sessions, guidance.channels, self.noise(),
            self.blend,
        )  # fmt: skip

    def steps(self, device, start=None, capturable=True, graphs=True, lane=None):
        job = self.job(start)
        runners = {k: Runner(device, s, capturable) for k, s in job.sessions.items()}
        lane = Lane(device) if lane is None else lane
        return denoise(job, TableBoard(lane, job, runners, graphs=graphs))


def _settled(blend, x, row):
    i = row.index
    still = blend.alphas[i] * blend.latent + blend.sigmas[i] * blend.noise
    return blend.mask * x + (1 - blend.mask) * still


def ends(case, device, **options):
    """(last step of the loop, last step of the device)"""
    pairs = list(zip(case.wanted(), case.steps(device, **options), strict=True))
    return pairs[-1]


def table_of(name="ddim", steps=STEPS, scale=5.0, prediction="eps", **options):
    levels = schedule.make(solvers.find(name).schedule, TRAINING, steps)
    return solvers.make(name, levels, prediction, **options).guided(scale)


def agree(found, wanted, rounding=0.0):
    """To the rounding of float32 in another order of summation, grown as the case makes it grow."""
    assert found.shape == wanted.shape
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=2e-6 + 8 * rounding)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_every_sampler(name, prediction, device):
    case = Case(table_of(name, prediction=prediction))
    wanted, step = ends(case, device)
    agree(step.x, wanted.x, case.rounding())
    agree(step.out, wanted.out, case.rounding())
    agree(step.before, wanted.before, case.rounding())


CASES = {
    "no guidance": Case(table_of(scale=1.0)),
    "apart": Case(table_of("dpmpp_2m"), halves="apart"),
    "one picture": Case(table_of("dpmpp_2m"), batch=1),
    "guidance in an interval": Case(guided_between(table_of("unipc_3"), 5.0, 0.3, 5.0)),
    "apart in an interval": Case(guided_between(table_of("ddim"), 5.0, 0.3, 5.0), halves="apart"),
    "shallow rows": Case(presets.with_cache(table_of("dpmpp_2m"), 3)),
    "shallow rows apart": Case(presets.with_cache(table_of("dpmpp_2m"), 2), halves="apart"),
    "shallow, the guided half left": Case(
        presets.with_cache(guided_between(table_of("plms", 9), 5.0, 1.0, 99.0), 4)
    ),
    "joined channels": Case(table_of("euler_a"), joined=JOINED),
    "joined channels apart": Case(table_of("euler_a"), joined=JOINED, halves="apart"),
    "blended": Case(table_of("euler_a"), blend=True),
    "many noisy rows": Case(table_of("euler_a", 3 * STAGED)),
    "one row": Case(table_of("ddim", 1)),
}


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "enqueued"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_row(name, graphs, device):
    case = CASES[name]
    wanted, step = ends(case, device, graphs=graphs)
    agree(step.x, wanted.x, case.rounding())
    assert bool(device.calls.count(("launch", "feed")) < len(case.table)) == (
        graphs and len(case.table) > 2
    )


def test_every_step_can_be_read_when_it_is_made(device):
    case = CASES["shallow rows"]
    for wanted, step in zip(case.wanted(), case.steps(device), strict=True):
        for name in ("x", "before", "out"):
            agree(getattr(step, name), getattr(wanted, name))
        state, kept = step.state(), wanted.state()
        assert state.rows == kept.rows == step.row.index + 1
        assert step.row == wanted.row
        agree(state.history, kept.history)


def test_steps_that_are_kept_can_be_read_later(device):
    case = CASES["apart"]
    steps = list(case.steps(device))
    assert len(steps) == STEPS
    for wanted, step in zip(case.wanted(), steps, strict=True):
        agree(step.x, wanted.x)
        agree(step.before, wanted.before)


def test_the_host_waits_once_at_the_end(device):
    """The order of the work: from the first row to the last nothing is waited for, and a row is
    feed, networks, advance, next_row; replayed from the third of its kind on."""
    case = Case(table_of("dpmpp_2m"), halves="apart")
    steps = case.steps(device)
    first = next(steps)
    row = [("launch", "feed"), ("network", "full"), ("network", "full"), ("launch", "advance"),
           ("launch", "next_row")]  # fmt: skip
    assert device.calls[-5:] == row
    device.calls.clear()
    del first
    for step in steps:
        if step.row.index == STEPS - 1:
            assert device.calls == [("replay", 5)] * (STEPS - 1)
    assert device.calls[STEPS - 1 :] == [("read", device.calls[STEPS - 1][1]), ("wait",), ("wait",)]


def test_noise_is_drawn_row_by_row_and_goes_ahead_of_its_row(device):
    case = Case(table_of("euler_a"))
    drawn = []
    job = case.job()
    job = replace(job, noise=lambda: (drawn.append(None), job.start.x)[1])
    runners = {k: Runner(device, s) for k, s in job.sessions.items()}
    steps = denoise(job, TableBoard(Lane(device), job, runners))
    for rows in range(1, STEPS):
        next(steps)
        assert len(drawn) == np.count_nonzero(case.table.n[:rows])
        assert device.calls[-1] in {("launch", "next_row"), ("replay", 4)}
    steps.close()
    kinds = [c for c in device.calls if c[0] in ("replay", "write")]
    assert kinds[-4:-1:2] == [("write", job.start.x.nbytes)] * 2


def test_far_ahead_the_host_waits_for_a_copy_not_for_a_row(device):
    case = CASES["many noisy rows"]
    for _ in case.steps(device):
        pass
    # 48 rows, the last without noise: the staging area was full after 16
    waits = [c for c in device.calls if c[0] == "wait_mark"]
    assert len(waits) == np.count_nonzero(case.table.n)


def test_an_engine_that_cannot_be_captured_is_enqueued(device):
    case = CASES["apart"]
    for _ in case.steps(device, capturable=False):
        pass
    assert not any(c[0] == "replay" for c in device.calls)
    assert device.calls.count(("launch", "advance")) == STEPS


def test_an_arena_that_grows_makes_graphs_anew(device):
    """A captured graph holds the arena's address: after it moved, the old graph must not run."""
    case, lane = CASES["no guidance"], Lane(device)
    steps = case.steps(device, lane=lane)
    for step in steps:
        if step.row.index == 3:
            assert len(device.graphs) == 1
            lane.scratch(5000)
        if step.row.index == 4:
            assert device.calls[-1] == ("launch", "next_row")
        last = step
    *_, wanted = case.wanted()
    agree(last.x, wanted.x)


def test_a_run_goes_on_from_a_state(device):
    case = Case(table_of("dpmpp_3m"))
    kept = next(s.state() for s in case.wanted() if s.row.index == 3)
    wanted = list(case.wanted(kept))
    found = list(case.steps(device, kept))
    assert [s.row.index for s in found] == [s.row.index for s in wanted] == [4, 5, 6]
    agree(found[-1].x, wanted[-1].x)


def test_memory_is_freed(device):
    before = len(device.memory)
    case, lane = CASES["shallow rows"], Lane(device)
    *_, step = case.steps(device, lane=lane)
    lane.close()
    assert np.isfinite(step.x).all()  # what was kept needs no device any more
    gc.collect()
    assert len(device.memory) == before
    assert not device.graphs
    assert not device.events
    assert not device.streams


def test_a_run_that_is_given_up_is_freed_too_and_its_last_step_read(device):
    case, lane = CASES["many noisy rows"], Lane(device)
    steps = case.steps(device, lane=lane)
    *_, step = itertools.islice(steps, 5)
    steps.close()
    *_, wanted = itertools.islice(case.wanted(), 5)
    agree(step.x, wanted.x)
    lane.close()
    gc.collect()
    assert (device.memory, device.graphs, device.streams) == ({}, {}, set())


def test_nan_is_told_with_its_row(device):
    case = Case(table_of("dpmpp_2m", 20), nan_below=0.5)
    first = next(i for i, t in enumerate(case.table.t) if t < 500)
    with pytest.raises(NumericsError, match=f"at step {first} .*guidance 5") as caught:
        for _ in case.steps(device):
            pass
    assert "--precision f32" in caught.value.hint
    with pytest.raises(NumericsError, match=f"at step {first} "):
        list(case.wanted())


def test_nan_is_told_when_a_step_is_read_and_not_before_it(device):
    case = Case(table_of("dpmpp_2m", 20), nan_below=0.5)
    first = next(i for i, t in enumerate(case.table.t) if t < 500)
    steps = case.steps(device)
    for step in steps:
        if step.row.index == first:
            with pytest.raises(NumericsError):
                step.x  # noqa: B018
            break
        assert np.isfinite(step.x).all()
    steps.close()


def test_no_room_on_the_device(built):
    device = FakeDevice(built, room=5_000)
    with pytest.raises(BackendError, match="no room"):
        next(Case(table_of(steps=50)).steps(device))
    gc.collect()
    assert device.memory == {}


def test_what_a_network_raises_ends_the_run(device):
    case = CASES["no guidance"]
    steps = case.steps(device)
    next(steps)

    def broken(lane):
        raise BackendError("the engine refuses the call", hint="another backend")

    runner = next(r for r in gc.get_objects() if isinstance(r, Runner) and r.device is device)
    runner.enqueue = broken
    with pytest.raises(BackendError, match="refuses the call"):
        list(steps)
    with pytest.raises(StopIteration):
        next(steps)
