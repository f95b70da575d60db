"""An image classifier as the bundle's `safety` component: any ONNX classifier with its labels.

What a model hub publishes is enough: `model.onnx`, its `config.json` (id2label) and its
`preprocessor_config.json` (size, mean, deviation). The graph is kept as it is; behind it stand the
few nodes that turn its scores into one probability.

checked by  tests/parity/test_classifier.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ..engine.bundle import SIGNATURES, ParityRecord
from ..engine.errors import (
    ExportError,
    NotACheckpoint,
    ParityFailure,
    RequestError,
    UnknownFact,
    UnknownName,
)
from ..engine.hashes import sha256_of
from ..engine.ports import Array, Backend, Floats
from ..engine.safety import COMPONENT
from ..engine.spec import Component, ComponentSpec, Graph, Precision, Profile
from ..engine.weights import read_header
from .containers import TensorRef
from .folders import read_json
from .graph.tools import save, specs
from .graph.weights import TYPES, bind_weights
from .graphs import WEIGHTS, keyed
from .weights_file import write_weights

UNSAFE = frozenset(
    {"nsfw", "unsafe", "explicit", "sexual", "sexy", "porn", "pornography", "hentai", "nude"}
)
LARGE = 64  # elements: from here on a float constant is a weight
SHOWN = 4  # pictures on which the finished component is compared with the file
# of a probability: how far the component may be from the file as it came
TOLERANCE: Mapping[Precision, float] = {"f32": 1e-3, "f16": 2e-2, "bf16": 2e-2}

Kind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Classifier:
    """What a file holds.

    size        side of its square input, pixels
    mean, std   of RGB in 0..1: the input is (RGB - mean) / std
    labels      of its scores, in their order
    unsafe      those that count
    threshold   from this probability on a picture is objected to, 0..1
    kind        softmax: one label of all, the unsafe ones' probabilities are added;
                sigmoid: each label by itself, the greatest unsafe one counts
    """

    file: Path
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    labels: tuple[str, ...]
    unsafe: tuple[str, ...]
    threshold: float
    kind: Kind


def open_classifier(
    path: Path, unsafe: Sequence[str] | None = None, threshold: float = 0.5
) -> Classifier:
    """A folder as model hubs publish it, or the .onnx file in one.

    unsafe      labels that count; None: those of UNSAFE that it has
    threshold   from this probability on a picture is objected to, 0..1
    raises      RequestError, NotACheckpoint, UnknownFact, UnknownName
    """
    if not 0 <= threshold <= 1:
        raise RequestError(
            f"the threshold of a classifier is {threshold:g}; 0 to 1 was expected",
            hint="0.5 objects where unsafe is likelier than not; lower is stricter",
        )
    file = _onnx_file(path)
    homes = [h for h in (file.parent, file.parent.parent) if (h / "config.json").is_file()]
    if not homes:
        raise UnknownFact(
            f"{file} has no config.json beside it, which names its labels",
            hint='write one: {"id2label": {"0": "safe", "1": "nsfw"}}, and a '
            "preprocessor_config.json with size, image_mean and image_std",
        )
    home = homes[0]
    config, shown = read_json(home / "config.json"), read_json(home / "preprocessor_config.json")
    by_id = config.get("id2label")
    if not isinstance(by_id, Mapping) or sorted(by_id) != sorted(map(str, range(len(by_id)))):
        raise UnknownFact(
            f"{home / 'config.json'} has no id2label with a name for each score, found {by_id!r}",
            hint='add one: {"id2label": {"0": "safe", "1": "nsfw"}}',
        )
    labels = tuple(str(by_id[str(i)]) for i in range(len(by_id)))
    each = config.get("problem_type") == "multi_label_classification" or len(labels) == 1
    mean, std = _colours(home, shown)
    return Classifier(
        file=file,
        size=_side(home, shown),
        mean=mean,
        std=std,
        labels=labels,
        unsafe=_counted(home, labels, unsafe),
        threshold=threshold,
        kind="sigmoid" if each else "softmax",
    )


def _onnx_file(path: Path) -> Path:
    places = [path / "model.onnx", path / "onnx" / "model.onnx"] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    raise NotACheckpoint(
        f"there is no {' and no '.join(map(str, places))}",
        hint="name an .onnx file, or a folder with model.onnx, config.json and "
        "preprocessor_config.json",
    )


def _side(home: Path, shown: Mapping[str, Any]) -> int:
    size = shown.get("crop_size" if shown.get("do_center_crop") else "size")
    found = set(size.values()) if isinstance(size, Mapping) else {size}
    side = found.pop() if len(found) == 1 else None
    if type(side) is not int or side < 1:
        raise UnknownFact(
            f"{home / 'preprocessor_config.json'}: size is {size!r}; one square size was expected",
            hint='say {"size": 224}: pictures are resized to that square',
        )
    return side


def _colours(home: Path, shown: Mapping[str, Any]) -> tuple[Any, Any]:
    if shown.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = [shown.get("image_mean"), shown.get("image_std")]
    for name, value in zip(("image_mean", "image_std"), found, strict=True):
        if not isinstance(value, list) or len(value) != 3:
            raise UnknownFact(
                f"{home / 'preprocessor_config.json'}: {name} is {value!r}; three numbers were "
                "expected",
                hint=f'say {{"{name}": [0.5, 0.5, 0.5]}}, or "do_normalize": false',
            )
    return tuple(map(float, found[0])), tuple(map(float, found[1]))


def _counted(home: Path, labels: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    if asked is not None:
        for name in asked:
            if name not in labels:
                raise UnknownName("label", name, labels)
        return tuple(asked)
    found = tuple(name for name in labels if name.lower() in UNSAFE)
    if not found:
        raise UnknownFact(
            f"none of the labels of {home} says by its name that a picture is unsafe: "
            f"{', '.join(labels)}",
            hint="name those that count: --safety-label NAME, once for each",
        )
    return found


def build(classifier: Classifier, folder: Path) -> Component:
    """The component: graph and weights are written into `folder`.

    raises      NotACheckpoint, ExportError
    """
    try:
        model = ir.load(classifier.file)
    except Exception as error:
        raise NotACheckpoint(
            f"{classifier.file} is not a sound ONNX file: {str(error).splitlines()[0]}",
            hint="fetch it again; large models have a .onnx_data file that must lie beside it",
        ) from error
    graph = model.graph
    _take_input(classifier, graph)
    refs = _take_weights(graph)
    folder.mkdir(parents=True)
    sha256 = write_weights(folder / WEIGHTS, refs)
    _give_probability(classifier, graph)
    model = bind_weights(model, read_header(folder / WEIGHTS), location=WEIGHTS)
    inputs, outputs = specs(model.graph.inputs), specs(model.graph.outputs)
    path = folder / "full.onnx"
    save(model, path)
    full = Graph("full", path, sha256_of(path), inputs, outputs, None)
    spec = ComponentSpec(COMPONENT, inputs, outputs)
    config = {
        "size": classifier.size,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "threshold": classifier.threshold,
        "unsafe": list(classifier.unsafe),
    }
    weights = folder / WEIGHTS
    return keyed(Component(spec, {"full": full}, weights, sha256, config, key=""))


def _take_input(classifier: Classifier, graph: ir.Graph) -> None:
    """Its one input becomes `image` float32 [B, 3, S, S]."""
    takes = [v for v in graph.inputs if v.name not in graph.initializers]
    (name,), _ = SIGNATURES[COMPONENT]
    side = classifier.size
    shape = list(takes[0].shape or ()) if len(takes) == 1 else []
    sizes = zip(shape[1:], (3, side, side), strict=False)
    fits = len(shape) == 4 and not isinstance(shape[0], int)
    fits = fits and all(not isinstance(found, int) or found == size for found, size in sizes)
    if not fits or takes[0].dtype != ir.DataType.FLOAT:
        found = ", ".join(f"{v.name} {v.dtype} {v.shape}" for v in takes)
        raise ExportError(
            f"{classifier.file} takes {found}; one float32 input [batch, 3, {side}, {side}] was "
            "expected, with a batch that is not fixed",
            hint="export the classifier with a dynamic batch, and see that the size in its "
            "preprocessor_config.json is its own",
        )
    graph.inputs[:] = [takes[0]]
    takes[0].name = name
    takes[0].shape = ir.Shape(("B", 3, side, side))


def _take_weights(graph: ir.Graph) -> list[TensorRef]:
    """Its float constants become graph inputs; what they hold is returned."""
    names = {dtype: name for name, dtype in TYPES.items()}
    refs = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in names or prod(tensor.shape.numpy()) < LARGE:
            continue
        raw = np.frombuffer(tensor.tobytes(), np.uint8)
        refs.append(
            TensorRef(name, names[tensor.dtype], tuple(tensor.shape.numpy()), lambda raw=raw: raw)  # type: ignore[misc]
        )
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return refs


def _give_probability(classifier: Classifier, graph: ir.Graph) -> None:
    """scores [B, labels] -> `unsafe` [B], with operators that no opset has changed."""
    scores = graph.outputs[0]
    width = None if scores.shape is None or len(scores.shape) != 2 else scores.shape[1]
    if width != len(classifier.labels):
        raise ExportError(
            f"{classifier.file}: its first output {scores.name} is {scores.shape}; "
            f"[batch, {len(classifier.labels)}] was expected, a score for each label",
            hint="name a classifier, with the config.json that belongs to it",
        )
    by_label = {"softmax": ("Softmax", {"axis": 1}), "sigmoid": ("Sigmoid", {})}
    together = {"softmax": "Sum", "sigmoid": "Max"}
    operator, attributes = by_label[classifier.kind]
    share = ir.node(operator, [scores], attributes, name="safety/each")
    nodes = [share]
    for i, label in enumerate(classifier.labels):
        if label in classifier.unsafe:
            at = ir.node("Constant", [], {"value": ir.tensor(np.array(i, np.int64))})
            nodes += [at, ir.node("Gather", [share.outputs[0], at.outputs[0]], {"axis": 1})]
    picked = [n.outputs[0] for n in nodes if n.op_type == "Gather"]
    last = ir.node(together[classifier.kind], picked, name="safety/unsafe")
    _, (name,) = SIGNATURES[COMPONENT]
    result = last.outputs[0]
    result.name, result.shape = name, ir.Shape(("B",))
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.extend([*nodes, last])
    graph.outputs[:] = [result]


def pictures(config: Mapping[str, Any]) -> Floats:
    """float32 [SHOWN, 3, S, S] as the component takes them: colours that run into each other."""
    side = config["size"]
    rng = np.random.default_rng(0)
    corners = rng.random((SHOWN, 3, 2, 2))
    x = np.linspace(0, 1, side)
    blend = np.stack([1 - x, x])
    unit = np.einsum("nchw,hy,wx->ncyx", corners, blend, blend)
    mean, std = (np.reshape(config[k], (1, 3, 1, 1)) for k in ("mean", "std"))
    return np.ascontiguousarray((unit - mean) / std, np.float32)


def of_the_file(classifier: Classifier, images: Floats) -> Array:
    """The probabilities [SHOWN] as the file itself, run by onnx's own evaluator, gives them."""
    scores = np.asarray(_evaluator(classifier.file)(images), np.float64)
    unsafe = [i for i, name in enumerate(classifier.labels) if name in classifier.unsafe]
    if classifier.kind == "sigmoid":
        return np.asarray((1 / (1 + np.exp(-scores)))[:, unsafe].max(axis=1))
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray((e / e.sum(axis=1, keepdims=True))[:, unsafe].sum(axis=1))


def _evaluator(file: Path) -> Callable[[Floats], Array]:
    """ONNX Runtime where it is installed; else the slow evaluator of the onnx package."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        from onnx.reference import ReferenceEvaluator

        slow = ReferenceEvaluator(str(file))
        return lambda images: slow.run(None, {slow.input_names[0]: images})[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]


def answers(component: Component, backend: Backend, precision: Precision) -> Array:
    """The probabilities [SHOWN] that the component gives there. Raises BackendError."""
    session = backend.load(component, Profile({"B": SHOWN}, precision))
    try:
        return session({"image": pictures(component.config)})["unsafe"]
    finally:
        session.close()


def judge(
    component: Component, backend: Backend, precision: Precision, expected: Array
) -> ParityRecord:
    """The component against what the file gives: a share of a probability, not a PSNR, since a
    classifier may call all of a few pictures safe alike. Raises ParityFailure, BackendError."""
    error = float(np.max(np.abs(answers(component, backend, precision) - expected)))
    gate = TOLERANCE[precision]
    if not error <= gate:
        raise ParityFailure(
            f"{COMPONENT} on {backend.name} in {precision}: a probability is {error:.3g} from "
            f"the file's own; required: {gate:g}. Nothing was saved",
            hint="the classifier may not bear this precision: make the bundle's target with "
            "`--precision f32`",
        )
    return ParityRecord(
        component=COMPONENT,
        graph="full",
        runtime=backend.name,
        precision=precision,
        case="pictures",
        output="unsafe",
        max_abs=error,
        psnr_db=None,
        gate=f"max abs {gate:g} of a probability",
    )
