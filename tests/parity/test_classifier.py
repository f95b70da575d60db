"""An image classifier as a hub publishes it, put into a bundle and asked about real pictures."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from sdengine import api, backends
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO
from sdengine.cli import app
from sdengine.engine import safety
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import (
    BackendError,
    ExportError,
    NotACheckpoint,
    ParityFailure,
    RequestError,
    UnknownFact,
    UnknownName,
)
from sdengine.export import add_classifier, add_target, classifier, open_classifier

pytestmark = [pytest.mark.export, pytest.mark.ov]

SIDE = 24
LABELS = {"0": "normal", "1": "nsfw"}
SHOWN = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def network(outputs=2, batch="batch", side=SIDE, channels=3):
    """`nsfw` is how much redder than blue a picture is; through a convolution with real weights."""
    kernel = np.zeros((4, channels, 5, 5), np.float32)
    kernel[0, 0], kernel[1, -1] = 0.04, 0.04
    scores = np.zeros((4, outputs), np.float32)
    scores[0, -1], scores[1, -1] = 3.0, -3.0
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["maps"], pads=[2, 2, 2, 2]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "scores"], ["logits"]),
    ]
    floats = TensorProto.FLOAT
    shape = [batch, channels, side, side]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", floats, shape)],
        [helper.make_tensor_value_info("logits", floats, [batch, outputs])],
        [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(scores, "scores")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def published(tmp_path):
    """A folder as model hubs have it."""

    def make(model=None, config=None, shown=None):
        home = tmp_path / "classifier"
        (home / "onnx").mkdir(parents=True)
        onnx.save(network() if model is None else model, home / "onnx" / "model.onnx")
        config = {"id2label": LABELS} if config is None else config
        (home / "config.json").write_text(json.dumps(config))
        (home / "preprocessor_config.json").write_text(json.dumps(shown or SHOWN))
        return home

    return make


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(api.EMBEDDED["emoji"], tmp_path / "bundle")


def odds(bundle, colour):
    """What the bundle's classifier says of a picture of one colour, 0..1."""
    found = open_bundle(bundle)
    sessions = api.EngineSessions(found, backends.choose("openvino")[0], "f32", 1)
    image = Image.new("RGB", (64, 48), colour)
    config = found.components["safety"].config
    word = safety.judge(image, "mark", sessions, config).word
    sessions.close()
    return float(word.split()[-1])


def test_a_bundle_with_a_classifier_judges_pictures(published, bundle):
    before = open_bundle(bundle)
    add_classifier(bundle, open_classifier(published()))
    found = open_bundle(bundle, verify=True)
    records = {(r.runtime, r.precision) for r in found.parity if r.component == "safety"}
    proved = {(t, p) for t, has in before.targets.items() for p in has.precisions if t != "torch"}
    assert records == proved
    # by hand: 25 taps of 0.04 on red, and on blue, less those that fall outside at the borders
    taps = (24 * 5 - 6) ** 2 / (24 * 5) ** 2
    for colour, logit in (("red", 6.0 * taps), ("blue", -6.0 * taps), ("grey", 0.0)):
        assert odds(bundle, colour) == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.011)


def test_a_run_is_stopped_at_a_picture_that_it_objects_to(published, bundle):
    add_classifier(bundle, open_classifier(published(), threshold=0.0))
    with api.load(bundle, backend="openvino", precision="f32", threads=1) as pipe:
        result = pipe(prompt="a fox", steps=1, safety="block")
    assert any(w.startswith("safety: blocked") for w in result.warnings)


def test_without_onnxruntime_the_file_is_still_what_counts(published, monkeypatch):
    """The evaluator of the onnx package gives what ONNX Runtime gives."""
    found = open_classifier(published())
    images = classifier.pictures({"size": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3})
    fast = classifier.of_the_file(found, images)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    np.testing.assert_allclose(classifier.of_the_file(found, images), fast, atol=1e-6)


def test_the_greatest_of_several_labels_counts(published, bundle):
    labels = {"0": "porn", "1": "violence", "2": "cat"}
    config = {"id2label": labels, "problem_type": "multi_label_classification"}
    found = open_classifier(published(network(3), config), unsafe=["porn", "cat"])
    add_classifier(bundle, found)
    # porn has score 0 whatever is shown, cat rises with red
    assert odds(bundle, "blue") == pytest.approx(0.5, abs=0.011)
    assert odds(bundle, "red") == pytest.approx(1 / (1 + np.exp(-6 * 0.9025)), abs=0.011)


def test_a_second_one_takes_the_place_of_the_first(published, bundle):
    found = open_classifier(published())
    add_classifier(bundle, found)
    add_classifier(bundle, replace(found, threshold=0.9))
    again = open_bundle(bundle, verify=True)
    assert again.components["safety"].config["threshold"] == 0.9
    subjects = [(r.runtime, r.precision) for r in again.parity if r.component == "safety"]
    assert len(subjects) == len(set(subjects))


def test_a_graph_that_says_something_else_is_refused(published, tmp_path):
    """A component whose weights are off by a tenth does not pass for the file."""
    found = open_classifier(published())
    component = classifier.build(found, tmp_path / "safety")
    expected = classifier.of_the_file(found, classifier.pictures(component.config))
    backend = OpenVINO(Store(limit=0))
    classifier.judge(component, backend, "f32", expected)
    raw = bytearray(component.weights.read_bytes())
    taps = np.frombuffer(raw, np.float32, offset=len(raw) - 4 * 300)
    np.multiply(taps, 1.1, out=taps)
    component.weights.write_bytes(raw)
    with pytest.raises(ParityFailure, match=r"from the file's own.*Nothing was saved"):
        classifier.judge(component, backend, "f32", expected)


def test_a_target_that_comes_later_judges_it_too(published, bundle):
    pytest.importorskip("onnxruntime")
    add_classifier(bundle, open_classifier(published()))
    content = json.loads((bundle / "manifest.json").read_text())
    content["targets"].pop("onnxruntime", None)
    content["parity"] = [r for r in content["parity"] if r["runtime"] != "onnxruntime"]
    (bundle / "manifest.json").write_text(json.dumps(content))
    add_target(bundle, ["onnxruntime"], ["f32"])
    found = open_bundle(bundle).parity
    assert ("onnxruntime", "f32") in {
        (r.runtime, r.precision) for r in found if r.component == "safety"
    }


def test_what_is_missing_is_named(published, tmp_path):
    home = published()
    with pytest.raises(
        NotACheckpoint, match=r"no .*model\.onnx and no .*onnx.model\.onnx"
    ) as error:
        open_classifier(tmp_path)
    assert "preprocessor_config.json" in error.value.hint
    with pytest.raises(RequestError, match=r"is 1\.5; 0 to 1") as wrong:
        open_classifier(home, threshold=1.5)
    assert "0.5" in wrong.value.hint
    with pytest.raises(UnknownName, match="unknown label 'nfsw'") as unknown:
        open_classifier(home, unsafe=["nfsw"])
    assert "'nsfw'" in unknown.value.hint
    (home / "preprocessor_config.json").unlink()
    with pytest.raises(NotACheckpoint, match="preprocessor_config"):
        open_classifier(home)
    (home / "config.json").unlink()
    with pytest.raises(UnknownFact, match=r"no config\.json beside it") as beside:
        open_classifier(home)
    assert "id2label" in beside.value.hint


@pytest.mark.parametrize(
    ("config", "shown", "says", "hint"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, SHOWN, "none of the labels", "--safety-label"),
        ({"id2label": {"1": "nsfw"}}, SHOWN, "no id2label", "id2label"),
        ({}, SHOWN, "no id2label", "id2label"),
        (None, SHOWN | {"size": {"height": 8, "width": 9}}, "one square size", "224"),
        (None, SHOWN | {"image_mean": 0.5}, "image_mean is 0.5", "do_normalize"),
    ],
)
def test_facts_that_do_not_say_what_is_needed(published, config, shown, says, hint):
    with pytest.raises(UnknownFact, match=says) as error:
        open_classifier(published(None, config, shown))
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (network(side=32), r"one float32 input \[batch, 3, 24, 24\]"),
        (network(channels=1), "one float32 input"),
        (network(batch=1), "with a batch that is not fixed"),
        (network(outputs=3), r"\[batch, 2\] was expected"),
    ],
)
def test_a_network_of_another_kind_is_refused(published, tmp_path, model, says):
    with pytest.raises(ExportError, match=says) as error:
        classifier.build(open_classifier(published(model)), tmp_path / "out")
    assert "classifier" in error.value.hint


def test_a_file_that_is_no_network_is_refused(published, tmp_path):
    home = published()
    (home / "onnx" / "model.onnx").write_bytes(b"no network" * 9)
    with pytest.raises(NotACheckpoint, match="is not a sound ONNX file") as error:
        classifier.build(open_classifier(home), tmp_path / "out")
    assert "fetch it again" in error.value.hint


def test_torch_is_told_before_the_first_step(published, bundle):
    add_classifier(bundle, open_classifier(published()))
    with api.load(bundle, backend="torch", precision="f32", threads=1) as pipe:
        steps = []
        with pytest.raises(BackendError, match="no network called 'safety'") as error:
            pipe(prompt="a fox", steps=1, safety="mark", on_step=steps.append)
        assert not steps
        assert "sdengine doctor" in error.value.hint


def test_the_command(published, bundle):
    runner = CliRunner()
    lost = runner.invoke(app, ["export", str(bundle), "--safety-label", "nsfw"])
    assert (lost.exit_code, "--safety model.onnx" in lost.stderr) == (2, True)
    done = runner.invoke(app, ["export", str(bundle), "-q", "--safety", str(published())])
    assert (done.exit_code, done.stdout.strip()) == (0, str(bundle))
    assert open_bundle(bundle).components["safety"].config["unsafe"] == ["nsfw"]
    # the rest of the bundle is the same: as a checkpoint it is what it was
    shown = runner.invoke(app, ["inspect", str(bundle), "--json"])
    assert "safety" in shown.stdout
