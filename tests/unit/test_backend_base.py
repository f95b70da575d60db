"""Guards, bind and prologue of the base, on backends of a few lines written here."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest

from sdengine.backends.base import GraphBackend, kept_by
from sdengine.engine.errors import (
    BackendError,
    BackendUnavailable,
    CorruptPart,
    FeedMismatch,
    MissingPart,
    SessionClosed,
)
from sdengine.engine.ports import Probe
from sdengine.engine.spec import Component, ComponentSpec, Graph, Profile, TensorSpec

X = TensorSpec("x", "float32", ("B", 3))
N = TensorSpec("n", "int64", ("B",))
TEXT = TensorSpec("text", "float32", ("B", 2))
SUM = TensorSpec("sum", "float32", ("B",))
Y = TensorSpec("y", "float32", ("B", 3))
DOUBLE = {"prologue": ((TEXT,), (SUM,)), "full": ((X, N, SUM), (Y,))}
PLAIN = {"full": ((X, N, TEXT), (Y,))}


class Numpy(GraphBackend):
    """y = x * n + sum of the text; counts what runs, and keeps what was compiled and held."""

    name = "numpy"

    def __init__(self, ok=True, fail_on=None):
        self.ran, self.compiled, self.closed = [], [], []
        self.ok, self.fail_on = ok, fail_on

    def probe(self):
        if not self.ok:
            return Probe(False, "numpy is not in the mood", mend="pip install mood")
        return Probe(True, "numpy", precisions=("bf16", "f32"))

    def compile(self, component, graph, profile):
        if self.fail_on == ("compile", graph.name):
            raise RuntimeError("\n  Check 'x' failed at core.cpp:7:\n  no memory\n")
        self.compiled.append(graph.name)
        return Part(self, graph)


class Part:
    def __init__(self, owner, graph):
        self.owner, self.graph = owner, graph

    def open(self, held):
        def run(feeds):
            if self.owner.fail_on == ("run", self.graph.name):
                raise RuntimeError("exploded")
            self.owner.ran.append(self.graph.name)
            given = {**held, **feeds}
            assert set(given) == {t.name for t in self.graph.inputs}
            assert all(v.flags.c_contiguous for v in given.values())
            if self.graph.name == "prologue":
                return {"sum": given["text"].sum(1)}
            total = given["sum"] if "sum" in given else given["text"].sum(1)
            return {"y": given["x"] * given["n"][:, None].astype("f4") + total[:, None]}

        return run

    def close(self):
        self.owner.closed.append(self.graph.name)


def component(graphs=DOUBLE):
    made = {n: Graph(n, Path(f"{n}.onnx"), "", i, o) for n, (i, o) in graphs.items()}
    spec = ComponentSpec("net", (X, N, TEXT), (Y,))
    return Component(spec, made, Path("weights.safetensors"), "", {}, "")


FEEDS = {
    "x": np.ones((2, 3), np.float32),
    "n": np.array([2, 3]),
    "text": np.array([[1, 2], [3, 4]], np.float32),
}
ANSWER = np.array([[5.0] * 3, [10.0] * 3], np.float32)
REST = {k: v for k, v in FEEDS.items() if k != "text"}
REST_X = {k: v for k, v in FEEDS.items() if k != "x"}


@pytest.mark.parametrize("graphs", [DOUBLE, PLAIN], ids=["prologue", "plain"])
@pytest.mark.parametrize("dims", [{}, {"B": 2}], ids=["free", "static"])
def test_bound_and_unbound(graphs, dims):
    session = Numpy().load(component(graphs), Profile(dims))
    np.testing.assert_array_equal(session(FEEDS)["y"], ANSWER)
    for held in (["text"], ["text", "x"], ["n"], ["x", "n", "text"], []):
        view = session.bind({k: FEEDS[k] for k in held})
        rest = {k: v for k, v in FEEDS.items() if k not in held}
        np.testing.assert_array_equal(view(rest)["y"], ANSWER)


def test_the_prologue_runs_once_when_bound_and_each_time_when_not():
    backend = Numpy()
    session = backend.load(component(), Profile())
    session(FEEDS)
    assert backend.ran == ["prologue", "full"]
    view = session.bind({"n": FEEDS["n"]}).bind({"text": FEEDS["text"]})
    assert backend.ran == ["prologue", "full", "prologue"]
    view({"x": FEEDS["x"]})
    view.bind({"x": FEEDS["x"]})({})
    assert backend.ran == ["prologue", "full", "prologue", "full", "full"]


def test_a_backend_that_takes_networks_whole_sees_no_prologue():
    class Whole(Numpy):
        whole = True

    backend = Whole()
    session = backend.load(component(), Profile())
    assert backend.compiled == ["full"]
    np.testing.assert_array_equal(session.bind({"text": FEEDS["text"]})(REST)["y"], ANSWER)


def test_a_backend_sees_contiguous_memory_only():
    """`Part` asserts it: engines that take a pointer would read the numbers in another order."""
    session = Numpy().load(component(), Profile())
    turned = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    wanted = session({**FEEDS, "x": np.ascontiguousarray(turned)})["y"]
    np.testing.assert_array_equal(session({**FEEDS, "x": turned})["y"], wanted)
    np.testing.assert_array_equal(session.bind({"x": turned})(REST_X)["y"], wanted)


def test_views_do_not_share_what_they_hold():
    session = Numpy().load(component(), Profile({"B": 2}))
    texts = [FEEDS["text"], FEEDS["text"] + 1]
    views = [session.bind({"text": t}) for t in texts]
    for _ in range(2):
        for view, more in zip(views, (0, 2), strict=True):
            np.testing.assert_array_equal(view(REST)["y"], ANSWER + more)


def test_close_reaches_views_graphs_and_memory():
    backend = Numpy()
    session = backend.load(component(), Profile())
    view = session.bind({"text": FEEDS["text"]})
    memory = weakref.ref(view._held["text"])
    session.close()
    assert sorted(backend.closed) == ["full", "prologue"]
    gc.collect()
    assert memory() is None, "a closed view must not keep its text"
    with pytest.raises(SessionClosed) as caught:
        view(REST)
    assert caught.value.message == "the session of net (numpy, f32) was closed"
    assert "load it again" in caught.value.hint
    session.close()
    assert sorted(backend.closed) == ["full", "prologue"]


def test_closing_a_view_leaves_the_network():
    backend = Numpy()
    session = backend.load(component(), Profile())
    session.bind({"text": FEEDS["text"]}).close()
    session(FEEDS)
    assert backend.closed == []


def test_a_view_keeps_the_network_alive():
    backend = Numpy()
    view = backend.load(component(), Profile()).bind({"text": FEEDS["text"]})
    gc.collect()
    np.testing.assert_array_equal(view(REST)["y"], ANSWER)
    view.bind({}).close()
    np.testing.assert_array_equal(view(REST)["y"], ANSWER)


def test_unavailable():
    with pytest.raises(BackendUnavailable, match="numpy cannot run here: numpy is not") as caught:
        Numpy(ok=False).load(component(), Profile())
    assert caught.value.hint == "pip install mood"


def test_a_precision_it_has_not():
    with pytest.raises(BackendUnavailable, match="cannot compute net in int8 here") as caught:
        Numpy().load(component(), Profile(precision="int8"))
    assert "bf16, f32" in caught.value.hint


@pytest.mark.parametrize(("dims", "what"), [({"h": 1}, "h = 1"), ({"B": -1}, "B = -1")])
def test_a_dimension_it_has_not(dims, what):
    with pytest.raises(FeedMismatch, match=f"net cannot be loaded with dimension {what}") as caught:
        Numpy().load(component(), Profile(dims))
    assert "its dimensions are B;" in caught.value.hint


def test_a_failing_library_while_loading():
    backend = Numpy(fail_on=("compile", "full"))
    with pytest.raises(BackendError) as caught:
        backend.load(component(), Profile({"B": 2}))
    assert caught.value.message == (
        "numpy cannot load net for f32 B2: Check 'x' failed at core.cpp:7:"
    )
    assert "sdengine inspect --verify" in caught.value.hint
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert backend.closed == ["prologue"], "what was compiled already is let go"


@pytest.mark.parametrize("where", ["prologue", "full"])
def test_a_failing_library_while_running(where):
    backend = Numpy()
    session = backend.load(component(), Profile())
    backend.fail_on = ("run", where)
    with pytest.raises(BackendError, match=r"numpy failed while running net .f32.: exploded") as e:
        session(FEEDS)
    assert "smaller size" in e.value.hint
    if where == "prologue":
        with pytest.raises(BackendError, match="exploded"):
            session.bind({"text": FEEDS["text"]})


def test_our_own_errors_pass_unchanged():
    class Picky(Numpy):
        def compile(self, component, graph, profile):
            raise CorruptPart("full.onnx is bad", hint="export again")

    with pytest.raises(CorruptPart, match=r"full\.onnx is bad"):
        Picky().load(component(), Profile())


def test_zero_is_no_size():
    session = Numpy().load(component(), Profile())
    with pytest.raises(FeedMismatch, match="dimension B is 0 in 'x'") as caught:
        session({k: v[:0] for k, v in FEEDS.items()})
    assert "1 or more" in caught.value.hint


def test_nothing_is_left_to_give():
    view = Numpy().load(component(), Profile()).bind(FEEDS)
    with pytest.raises(FeedMismatch, match="unknown input 'y'") as caught:
        view({"y": FEEDS["x"]})
    assert "it takes no further input" in caught.value.hint


def test_nothing_is_printed(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        Numpy().load(component(), Profile())(FEEDS)
    assert capfd.readouterr() == ("", "")


# Several step graphs

DEEP = TensorSpec("features0", "float32", ("B", 3))
CUT = {
    **DOUBLE,
    "deep": ((X, N, SUM), (Y, DEEP)),
    "shallow0": ((X, N, DEEP), (Y,)),
}


class Cut(Numpy):
    """Its deep features are the sum of the text: shallow0 gives y without looking at the text."""

    def compile(self, component, graph, profile):
        part = super().compile(component, graph, profile)
        if graph.name not in ("deep", "shallow0"):
            return part
        return CutPart(self, graph)


class CutPart(Part):
    def open(self, held):
        def run(feeds):
            self.owner.ran.append(self.graph.name)
            given = {**held, **feeds}
            assert set(given) == {t.name for t in self.graph.inputs}
            deep = given.get("features0")
            if deep is None:
                total = given["sum"] if "sum" in given else given["text"].sum(1)
                deep = np.repeat(total[:, None], 3, axis=1)
            y = given["x"] * given["n"][:, None].astype("f4") + deep
            return {t.name: {"y": y, "features0": deep}[t.name] for t in self.graph.outputs}

        return run


def test_a_step_graph_is_compiled_when_it_is_asked_for():
    backend = Cut()
    session = backend.load(component(CUT), Profile())
    assert backend.compiled == ["prologue"]
    view = session.bind({"text": FEEDS["text"]})
    deep = view.graph("deep")
    assert backend.compiled == ["prologue", "deep"]
    found = deep(REST)
    np.testing.assert_array_equal(found["y"], ANSWER)
    shallow = view.graph("shallow0")
    np.testing.assert_array_equal(shallow({**REST, "features0": found["features0"]})["y"], ANSWER)
    assert backend.compiled == ["prologue", "deep", "shallow0"], "full is not, and need not be"
    assert backend.ran == ["prologue", "deep", "shallow0"], "the prologue ran once, for both"
    view.graph("deep")
    np.testing.assert_array_equal(session(FEEDS)["y"], ANSWER)
    assert backend.compiled == ["prologue", "deep", "shallow0", "full"]
    assert backend.ran[3:] == ["prologue", "full"]


def test_graphs_of_an_unbound_session_and_of_a_view_of_a_graph():
    session = Cut().load(component(CUT), Profile({"B": 2}))
    features = session.graph("deep")(FEEDS)["features0"]
    shallow = session.graph("shallow0")
    np.testing.assert_array_equal(shallow({**FEEDS, "features0": features})["y"], ANSWER)
    held = shallow.bind({"features0": features, "text": FEEDS["text"]})
    np.testing.assert_array_equal(held(REST)["y"], ANSWER)
    np.testing.assert_array_equal(held.graph("full")(REST)["y"], ANSWER)


def test_a_graph_says_what_it_takes_and_gives():
    session = Cut().load(component(CUT), Profile({"B": 2}))
    assert [t.name for t in session.graph("deep").spec.outputs] == ["y", "features0"]
    shallow = session.graph("shallow0")
    assert [t.name for t in shallow.spec.inputs] == ["x", "n", "text", "features0"]
    with pytest.raises(FeedMismatch, match="'features0' is missing"):
        shallow(FEEDS)
    with pytest.raises(FeedMismatch, match=r"'features0' has shape \[1, 3\], expected \[2, 3\]"):
        shallow({**FEEDS, "features0": np.ones((1, 3), np.float32)})
    with pytest.raises(FeedMismatch, match="unknown input 'features0'"):
        session({**FEEDS, "features0": np.ones((2, 3), np.float32)})


def test_a_backend_that_takes_networks_whole_sees_features_too():
    class Whole(Cut):
        whole = True

    backend = Whole()
    view = backend.load(component(CUT), Profile()).bind({"text": FEEDS["text"]})
    features = view.graph("deep")(REST)["features0"]
    np.testing.assert_array_equal(features[:, 0], FEEDS["text"].sum(1))
    assert backend.compiled == ["deep"]


@pytest.mark.parametrize("name", ["shallow0", "deep", "prologue", "fully"])
def test_a_graph_that_the_bundle_lacks(name):
    session = Numpy().load(component(), Profile())
    with pytest.raises(MissingPart, match=f"net has no graph '{name}'; it has full") as caught:
        session.graph(name)
    assert "sdengine export BUNDLE --out FOLDER" in caught.value.hint


def test_a_library_that_fails_at_a_later_graph():
    backend = Cut(fail_on=("compile", "deep"))
    session = backend.load(component(CUT), Profile())
    with pytest.raises(BackendError, match="numpy cannot load net/deep for f32: Check 'x'"):
        session.graph("deep")
    np.testing.assert_array_equal(session(FEEDS)["y"], ANSWER)
    session.close()
    assert sorted(backend.closed) == ["full", "prologue"]
    with pytest.raises(SessionClosed, match="was closed"):
        session.graph("deep")


def test_closing_reaches_the_views_of_all_graphs():
    session = Cut().load(component(CUT), Profile())
    view = session.bind({"text": FEEDS["text"]}).graph("deep")
    session.close()
    with pytest.raises(SessionClosed, match=r"net/deep \(numpy, f32\) was closed"):
        view(REST)


def test_what_a_caller_only_hands_on_may_stay_on_a_device():
    """Features may; what a band gives the caller works on, with numpy."""
    features = TensorSpec("features0", "float32", ("B", 4))
    deep = Graph("deep", Path("deep.onnx"), "", (X,), (Y, features), None)
    band = Graph("outer1", Path("outer1.onnx"), "", (X,), (features, SUM), None)
    spec = ComponentSpec("unet", (X,), (Y,))
    both = {"deep": deep, "outer1": band}
    component = Component(spec, both, Path("w.safetensors"), "", {}, key="")
    assert kept_by(component, deep) == {"features0"}
    assert kept_by(component, band) == frozenset()
