"""What both halves of guided rows have in common is computed once, and gives what it gave."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from sdengine import api
from sdengine.backends import openvino_floats, openvino_pairs
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO, library
from sdengine.backends.openvino_pairs import compute_once, is_double
from sdengine.engine.bundle import open_bundle
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.ov

SIDE, TOKENS = 16, 77


@pytest.fixture(scope="module")
def unet():
    return open_bundle(api.EMBEDDED["emoji"]).components["unet"]


@pytest.fixture
def ops():
    library()
    from openvino import opset13

    return opset13


def feeds(unet, rng, rows):
    """Latents and times of all pictures, twice, and a text for each row."""
    spec = {t.name: t.shape for t in unet.spec.inputs}
    x = rng.standard_normal((rows // 2, spec["sample"][1], SIDE, SIDE), np.float32)
    times = rng.uniform(0, 999, rows // 2).astype(np.float32)
    text = rng.standard_normal((rows, TOKENS, spec["encoder_hidden_states"][2]), np.float32)
    return {"sample": np.concatenate([x, x]), "timestep": np.concatenate([times, times]),
            "encoder_hidden_states": text}  # fmt: skip


def profile(rows, precision="f32", **how):
    return Profile({"B": rows, "T": TOKENS, "h": SIDE, "w": SIDE}, precision, threads=1, **how)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("graph", ["full", "deep"])
def test_it_gives_what_it_gave(graph, precision, rows, unet, rng, tmp_path, monkeypatch):
    """In bfloat16 bit for bit: nothing is rounded that was not. Two pictures keep their places.
    Convolutions in float32, though, add in another order for half the rows."""
    monkeypatch.setattr(openvino_floats, "_cheap", lambda _: set())
    backend = OpenVINO(Store(tmp_path, limit=0))
    if precision not in backend.probe().precisions:
        pytest.skip("this processor has no bfloat16 instructions")
    given = feeds(unet, rng, rows)
    plain = backend.load(unet, profile(rows, precision)).graph(graph)(given)
    once = backend.load(unet, profile(rows, precision, paired=True)).graph(graph)(given)
    assert plain.keys() == once.keys()
    for name, due in plain.items():
        off = np.abs(once[name] - due).max()
        assert off <= (1e-5 * np.abs(due).max() if precision == "f32" else 0), name


def test_the_first_block_is_computed_for_half_the_rows(unet):
    model = library().Core().read_model(unet.graphs["full"].path)
    dims = profile(2).dims
    graph = unet.graphs["full"]
    model.reshape({t.name: [dims.get(d, d) for d in t.shape] for t in graph.inputs})
    assert compute_once(model) > 2
    rows = {n.get_friendly_name(): n.get_output_shape(0)[0] for n in model.get_ordered_ops()
            if n.get_type_name() == "Convolution"}  # fmt: skip
    assert sorted(set(rows.values())) == [1, 2]
    first, *_, last = rows.values()
    assert (first, last) == (1, 2)
    assert len(rows) == len(set(rows)), "none is there twice"
    softmaxes = [n.get_output_shape(0)[0] for n in model.get_ordered_ops()
                 if n.get_type_name() == "Softmax"]  # fmt: skip
    assert softmaxes[0] == 1, "the cells of the map look at each other before they see the text"
    assert set(softmaxes[1:]) == {2}


def test_what_is_not_in_pairs_stays_as_it_is(unet, rng, tmp_path):
    """Two pictures without guidance are two rows, too."""
    backend = OpenVINO(Store(tmp_path))
    given = feeds(unet, rng, 4)
    given["sample"][2:] *= 0.5
    whole = backend.load(unet, profile(4))(given)["out_sample"]
    backend.load(unet, profile(4, paired=True))
    again = OpenVINO(Store(tmp_path)).load(unet, profile(4))(given)["out_sample"]
    np.testing.assert_array_equal(again, whole)


def toy(ops, end, *, rows=2, free=False):
    """x [rows, 6] and a text [rows, 6], through `end(doubled x, text)`."""
    shape = [-1 if free else rows, 6]
    x = ops.parameter(shape, np.float32, name="sample")
    text = ops.parameter(shape, np.float32, name="encoder_hidden_states")
    for node, name in ((x, "sample"), (text, "encoder_hidden_states")):
        node.output(0).set_names({name})
    made = end(ops.multiply(x, np.float32(2)), text)
    return library().Model([ops.result(made)], [x, text], "toy")


def computed(model, x, text):
    run = library().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return run({"sample": x, "encoder_hidden_states": text})[0]


def test_a_shape_that_is_asked_for(ops, rng):
    """Whoever asks for the shape of what is halved must still hear of all rows."""

    def end(x, text):
        return ops.add(ops.broadcast(ops.reduce_sum(text, [0, 1]), ops.shape_of(x)), x)

    before, after = toy(ops, end), toy(ops, end)
    x, text = rng.standard_normal((1, 6), np.float32), rng.standard_normal((2, 6), np.float32)
    x = np.concatenate([x, x])
    assert compute_once(after) == 1
    np.testing.assert_allclose(computed(after, x, text), computed(before, x, text), rtol=1e-6)


@pytest.mark.parametrize(
    ("why", "end", "how"),
    [
        ("an odd number of rows", "add", {"rows": 3}),
        ("free rows", "add", {"free": True}),
        ("rows on another axis", "turned", {}),
        ("rows that the graph says", "stated", {}),
        ("another network for half the rows", "smaller", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left(why, end, how, ops):
    def turned(x, text):
        one, other = (ops.transpose(v, np.array([1, 0])) for v in (x, text))
        return ops.concat([one, other], 0)

    def stated(x, text):
        return ops.add(ops.reshape(x, [6, 2], False), ops.reshape(text, [6, 2], False))

    def smaller(x, text):
        """A reshape of half the rows takes it into the product."""
        return ops.matmul(ops.transpose(x, np.array([1, 0])), text, False, False)

    ends = {"add": ops.add, "turned": turned, "stated": stated, "smaller": smaller}
    model = toy(ops, ends[end], **how)
    before = [n.get_type_name() for n in model.get_ordered_ops()]
    assert compute_once(model) == 0, why
    assert [n.get_type_name() for n in model.get_ordered_ops()] == before


def test_an_input_without_rows(ops):
    x, level = ops.parameter([2, 6], np.float32), ops.parameter([], np.float32)
    for node, name in ((x, "sample"), (level, "level")):
        node.output(0).set_names({name})
    model = library().Model([ops.result(ops.multiply(x, level))], [x, level], "toy")
    assert compute_once(model) == 0


def test_nothing_in_common(ops):
    model = toy(ops, ops.add)
    for port in model.inputs:
        port.get_node().output(0).set_names({f"not {port.any_name}"})
    assert compute_once(model) == 0


def test_what_hands_one_result_on(ops):
    model = toy(ops, ops.add)
    assert compute_once(model) == 1
    kinds = [n.get_type_name() for n in model.get_ordered_ops() if is_double(n)]
    assert kinds == ["Clamp", "Concat"]
    x = ops.parameter([2, 2], np.float32)
    other = ops.concat([x, ops.clamp(ops.relu(x), *openvino_pairs.MOST)], 0)
    assert not is_double(other), "another's"
    assert not is_double(ops.concat([x, x], 0))
