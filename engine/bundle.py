"""The reader of docs/bundle-format.md: opens a bundle, checks it, and never writes into it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from . import fields
from .errors import (
    BadManifest,
    CorruptPart,
    MissingPart,
    NotABundle,
    StorageError,
    UnknownFormat,
    UnsafePath,
)
from .hashes import remembered_sha256, sha256_of
from .spec import (
    DTYPES,
    PRECISIONS,
    Component,
    ComponentSpec,
    Dim,
    Engine,
    Graph,
    Precision,
    TensorSpec,
    is_band,
    named_dims,
)
from .weights import read_header, totals

FORMAT = 1
MANIFEST = "manifest.json"

Variant = Literal["base", "inpainting", "depth", "x4-upscaler", "unclip-h", "unclip-l"]
Prediction = Literal["eps", "v"]

VARIANTS: tuple[str, ...] = ("base", "inpainting", "depth", "x4-upscaler", "unclip-h", "unclip-l")
PREDICTIONS: tuple[str, ...] = ("eps", "v")

# component -> the inputs and outputs that every variant of it has
SIGNATURES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "text_encoder": (frozenset({"input_ids"}), frozenset({"last_hidden_state"})),
    "unet": (
        frozenset({"sample", "timestep", "encoder_hidden_states"}),
        frozenset({"out_sample"}),
    ),
    "vae_encoder": (frozenset({"image"}), frozenset({"moments"})),
    "vae_decoder": (frozenset({"latent"}), frozenset({"image"})),
    "depth": (frozenset({"image"}), frozenset({"depth"})),
    "image_encoder": (frozenset({"pixels"}), frozenset({"embedding"})),
    "safety": (frozenset({"image"}), frozenset({"unsafe"})),
}
# In the weights of `image_encoder`, where `image_conditioning` says that there are statistics:
# float32 [embedding], mean and deviation of the embeddings that the model was trained on.
STATISTICS = ("noise_augmentor.data_mean", "noise_augmentor.data_std")


@dataclass(frozen=True)
class ScheduleFacts:
    """The betas that the model was trained with."""

    kind: Literal["scaled_linear"]
    beta_start: float
    beta_end: float
    timesteps: int


@dataclass(frozen=True)
class LatentFacts:
    """scale multiplies what the encoder gives; factor is pixels a latent cell, on each side."""

    channels: int
    scale: float
    factor: int
    multiple: int


@dataclass(frozen=True)
class TokenizerFacts:
    start: int
    end: int
    pad: int
    length: int


@dataclass(frozen=True)
class SourceFacts:
    """The checkpoint that the bundle was made from."""

    file: str
    sha256: str
    kind: str
    weights: Literal["ema", "plain"]


@dataclass(frozen=True)
class PreviewFacts:
    """RGB in -1..1 is `latent @ matrix + bias`: matrix [channels, 3], bias [3]."""

    matrix: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True)
class LowScaleFacts:
    """How the x4 upscaler's small picture is noised: a level is a step of `schedule`, and the
    UNet's class label; max_level is the highest that the model was trained with."""

    schedule: ScheduleFacts
    max_level: int


@dataclass(frozen=True)
class NoiseFacts:
    """The noise of an image embedding: levels 0..timesteps-1."""

    kind: Literal["squaredcos_cap_v2"]
    timesteps: int


@dataclass(frozen=True)
class ImageConditioningFacts:
    """How unCLIP's picture becomes a class vector.

    size        pixels of a side of what the image tower takes
    mean, std   of RGB in 0..1, by which its pixels are normalised
    embedding   width of what it gives; the class vector is twice as wide
    statistics  whether the weights of `image_encoder` hold those of the embedding (STATISTICS);
                without them mean 0, deviation 1
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedding: int
    noise: NoiseFacts
    statistics: bool


@dataclass(frozen=True)
class ModelFacts:
    """native_size is (height, width) in pixels; the last three only where the model has them."""

    name: str
    variant: Variant
    prediction: Prediction
    schedule: ScheduleFacts
    latent: LatentFacts
    native_size: tuple[int, int]
    tokenizer: TokenizerFacts
    licence: str
    source: SourceFacts
    preview: PreviewFacts | None = None
    low_scale: LowScaleFacts | None = None
    image_conditioning: ImageConditioningFacts | None = None


@dataclass(frozen=True)
class Target:
    """What the bundle was made ready for; `files` are portable artefacts of that engine."""

    name: str
    precisions: tuple[Precision, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class ParityRecord:
    """How far a graph was from the float32 torch reference; psnr_db is None when it was equal."""

    component: str
    graph: str
    runtime: str
    precision: Precision
    case: str
    output: str
    max_abs: float
    psnr_db: float | None
    gate: str


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `files` has the paths as the manifest spells them."""

    path: Path
    id: str
    producer: Mapping[str, str]
    facts: ModelFacts
    components: Mapping[str, Component]
    targets: Mapping[str, Target]
    parity: tuple[ParityRecord, ...]
    files: Mapping[str, FileRecord]
    tokenizer_file: Path

    def component(self, name: str) -> Component:
        """Raises MissingPart when this bundle has no such component."""
        if name not in self.components:
            raise MissingPart(
                f"{self.path} has no {name}; it has {', '.join(self.components)}",
                hint="export a checkpoint that holds it, or choose a task that does without",
            )
        return self.components[name]


def open_bundle(path: Path, *, verify: bool = False, unfinished: bool = False) -> Bundle:
    """The bundle at `path`, with every check of docs/bundle-format.md made.

    verify      compute every hash again, remembered or not
    unfinished  open a folder that an export has not renamed yet: for the writer's own check
    raises      BundleError, by the table of docs/bundle-format.md; StorageError when a file that
                is there cannot be read
    """
    folder = path.resolve()
    _check_folder(path, folder, unfinished)
    try:
        manifest = fields.parse(_read(folder / MANIFEST))
        _check_format(manifest)
        parts: _Manifest = _MANIFEST(manifest, fields.ROOT)
        _check_references(parts)
        _check_facts(parts)
        for name, part in parts.components.items():
            _check_signature(name, part)
    except (BadManifest, UnsafePath, UnknownFormat, MissingPart) as error:
        raise type(error)(f"{path / MANIFEST}: {error.message}", hint=error.hint) from error
    files = {name: _locate(folder, name) for name in parts.files}
    _check_files(parts, files, verify)
    return _assemble(folder, manifest, parts, files)


# What the manifest may say: field -> kind


@dataclass(frozen=True)
class _Tokenizer:
    file: str
    start: int
    end: int
    pad: int
    length: int


@dataclass(frozen=True)
class _Graph:
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int | None = None


@dataclass(frozen=True)
class _Component:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graphs: Mapping[str, _Graph]
    weights: str
    config: Mapping[str, Any]
    quantised: Mapping[Precision, _Twin] = field(default_factory=dict)
    typed: Mapping[Precision, _Twin] = field(default_factory=dict)


@dataclass(frozen=True)
class _Twin:
    """The same network once more: quantised, or strongly typed."""

    graphs: Mapping[str, _Graph]
    weights: str
    source: str
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class _Engine:
    file: str
    component: str
    precision: Precision
    graph: str
    sm: int
    dims: Mapping[str, tuple[int, int, int]]
    version: str
    fingerprint: str


@dataclass(frozen=True)
class _Target:
    precisions: tuple[Precision, ...]
    files: tuple[str, ...]
    engines: tuple[_Engine, ...] = ()


@dataclass(frozen=True)
class _Manifest:
    format: int
    producer: Mapping[str, str]
    model: Any  # ModelFacts whose tokenizer is still a _Tokenizer
    components: Mapping[str, _Component]
    files: Mapping[str, FileRecord]
    targets: Mapping[str, _Target]
    parity: tuple[ParityRecord, ...]


_NAME = fields.matching(r"[a-z][a-z0-9_-]*", "a name of small letters, digits, '_' and '-'")
_GRAPH_NAME = fields.matching(
    r"[a-z][a-z0-9_]*(@[a-z0-9]+)?", "a name such as 'full' or 'full@f16'"
)
_SHALLOW = re.compile(r"shallow(\d+)")
_FEATURES = re.compile(r"features\d+")
_TENSOR_NAME = fields.matching(r"[A-Za-z_][A-Za-z0-9_.]*", "the name of a tensor")
_DIM_NAME = fields.matching(r"[A-Za-z_][A-Za-z0-9_]*", "a number, or the name of a dimension")
_SHA256 = fields.matching(r"[0-9a-f]{64}", "64 hex digits in small letters")
_SIDE = fields.integer(1, 1 << 20)
_TOKEN = fields.integer(0, 1 << 20)
_PRECISION = fields.one_of(*PRECISIONS)


def _dim(value: Any, where: str) -> Dim:
    return _DIM_NAME(value, where) if isinstance(value, str) else _SIDE(value, where)


def _json_object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        fields.refuse(where, "an object", value)
    return MappingProxyType(value)


def _tensors(low: int) -> fields.Kind[tuple[TensorSpec, ...]]:
    tensor = fields.record(
        TensorSpec,
        {"name": _TENSOR_NAME, "dtype": fields.one_of(*DTYPES), "shape": fields.sequence(_dim)},
    )
    several = fields.sequence(tensor, low=low)

    def check(value: Any, where: str) -> tuple[TensorSpec, ...]:
        found = several(value, where)
        if len({t.name for t in found}) != len(found):
            fields.refuse(where, "tensors of different names", [t.name for t in found])
        return found

    return check


_SCHEDULE = fields.record(
    ScheduleFacts,
    {
        "kind": fields.one_of("scaled_linear"),
        "beta_start": fields.number(1e-9, 0.999),
        "beta_end": fields.number(1e-9, 0.999),
        "timesteps": fields.integer(1, 1_000_000),
    },
)

_LATENT = fields.record(
    LatentFacts,
    {
        "channels": fields.integer(1, 1024),
        "scale": fields.number(1e-6, 1e6),
        "factor": fields.integer(1, 1024),
        "multiple": fields.integer(1, 1024),
    },
)

_SOURCE = fields.record(
    SourceFacts,
    {
        "file": fields.text,
        "sha256": _SHA256,
        "kind": fields.text,
        "weights": fields.one_of("ema", "plain"),
    },
)

_RGB = fields.sequence(fields.number(), low=3, high=3)

_IMAGE_CONDITIONING = fields.record(
    ImageConditioningFacts,
    {
        "size": _SIDE,
        "mean": _RGB,
        "std": fields.sequence(fields.number(1e-6), low=3, high=3),
        "embedding": fields.integer(1, 1 << 20),
        "noise": fields.record(
            NoiseFacts,
            {
                "kind": fields.one_of("squaredcos_cap_v2"),
                "timesteps": fields.integer(1, 1_000_000),
            },
        ),
        "statistics": fields.boolean,
    },
)

_MODEL = fields.record(
    ModelFacts,
    {
        "name": fields.text,
        "variant": fields.one_of(*VARIANTS),
        "prediction": fields.one_of(*PREDICTIONS),
        "schedule": _SCHEDULE,
        "latent": _LATENT,
        "native_size": fields.sequence(_SIDE, low=2, high=2),
        "tokenizer": fields.record(
            _Tokenizer,
            {
                "file": fields.path,
                "start": _TOKEN,
                "end": _TOKEN,
                "pad": _TOKEN,
                "length": fields.integer(3, 1 << 20),
            },
        ),
        "licence": fields.text,
        "source": _SOURCE,
    },
    optional={
        "preview": fields.record(
            PreviewFacts, {"matrix": fields.sequence(_RGB, low=1), "bias": _RGB}
        ),
        "low_scale": fields.record(
            LowScaleFacts, {"schedule": _SCHEDULE, "max_level": fields.integer(0, 1_000_000)}
        ),
        "image_conditioning": _IMAGE_CONDITIONING,
    },
)

_GRAPHS = fields.mapping(
    _GRAPH_NAME,
    fields.record(
        _Graph,
        {"file": fields.path, "inputs": _tensors(1), "outputs": _tensors(1)},
        optional={"macs": fields.integer(1)},
    ),
)

_TWIN = fields.record(
    _Twin,
    {"graphs": _GRAPHS, "weights": fields.path, "source": _SHA256, "recipe": _json_object},
)

_COMPONENT = fields.record(
    _Component,
    {
        "inputs": _tensors(1),
        "outputs": _tensors(1),
        "graphs": _GRAPHS,
        "weights": fields.path,
        "config": _json_object,
    },
    optional={
        "quantised": fields.mapping(fields.one_of("int8"), _TWIN),
        "typed": fields.mapping(fields.one_of("f16", "bf16", "int8", "fp8"), _TWIN),
    },
)


def _span(value: Any, where: str) -> tuple[int, int, int]:
    least, best, most = fields.sequence(_SIDE, low=3, high=3)(value, where)
    if not least <= best <= most:
        fields.refuse(where, "least, best and largest size, in this order", value)
    return least, best, most


_ENGINE = fields.record(
    _Engine,
    {
        "file": fields.path,
        "component": _NAME,
        "precision": _PRECISION,
        "graph": _GRAPH_NAME,
        "sm": fields.integer(50, 999),
        "dims": fields.mapping(_DIM_NAME, _span),
        "version": fields.text,
        "fingerprint": _SHA256,
    },
)

_TARGET = fields.record(
    _Target,
    {"precisions": fields.sequence(_PRECISION, low=1), "files": fields.sequence(fields.path)},
    optional={"engines": fields.sequence(_ENGINE)},
)

_PARITY = fields.record(
    ParityRecord,
    {
        "component": fields.text,
        "graph": fields.text,
        "runtime": fields.text,
        "precision": _PRECISION,
        "case": fields.text,
        "output": fields.text,
        "max_abs": fields.number(0),
        "psnr_db": fields.or_null(fields.number()),
        "gate": fields.text,
    },
)

_MANIFEST = fields.record(
    _Manifest,
    {
        "format": fields.integer(FORMAT, FORMAT),
        "producer": fields.mapping(fields.text, fields.text),
        "model": _MODEL,
        "components": fields.mapping(_NAME, _COMPONENT, low=1),
        "files": fields.mapping(
            fields.path, fields.record(FileRecord, {"size": fields.integer(0), "sha256": _SHA256})
        ),
        "targets": fields.mapping(_NAME, _TARGET),
        "parity": fields.sequence(_PARITY),
    },
)


# The folder and its manifest

_PARTIAL = re.compile(r"\..*\.partial-.*", re.DOTALL)


def _check_folder(path: Path, folder: Path, unfinished: bool) -> None:
    if not folder.is_dir():
        found = "there is a file" if folder.exists() else "there is nothing"
        raise NotABundle(
            f"{path} is not a bundle: expected a folder, {found}",
            hint="give the folder that `sdengine export CHECKPOINT --out FOLDER` wrote",
        )
    if _PARTIAL.fullmatch(folder.name) and not unfinished:
        raise NotABundle(
            f"{path} is what an export left that did not finish",
            hint="run the same `sdengine export` again: it removes this folder",
        )
    if not (folder / MANIFEST).is_file():
        raise NotABundle(
            f"{path} is not a bundle: it has no {MANIFEST}",
            hint="a checkpoint becomes a bundle by `sdengine export CHECKPOINT --out FOLDER`",
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {file}: {error.strerror}", hint="check the file and its permissions"
        ) from error


def _check_format(manifest: Any) -> None:
    if not isinstance(manifest, dict) or "format" not in manifest:
        fields.refuse(fields.ROOT, "an object with the key format", manifest)
    found = manifest["format"]
    if type(found) is not int or found != FORMAT:
        newer = type(found) is int and found > FORMAT
        raise UnknownFormat(
            f"format {found!r}; this version of sdengine reads format {FORMAT}",
            hint="pip install -U sdengine" if newer else fields.REWRITE,
        )


def _check_references(parts: _Manifest) -> None:
    """Every path that is used is listed in `files`, and every listed one is used."""
    used = dict(_uses(parts))
    for name, where in used.items():
        if name not in parts.files:
            raise BadManifest(f"`{where}`: {name!r} is not listed in `files`", hint=fields.REWRITE)
    if idle := [name for name in parts.files if name not in used]:
        raise BadManifest(
            f"`files`: nothing in the manifest uses {', '.join(idle)}", hint=fields.REWRITE
        )


def _check_facts(parts: _Manifest) -> None:
    """What one field says about another."""
    model = parts.model
    schedules = {"model.schedule": model.schedule}
    if model.low_scale is not None:
        schedules["model.low_scale.schedule"] = model.low_scale.schedule
        if model.low_scale.max_level >= model.low_scale.schedule.timesteps:
            most = f"a level below {model.low_scale.schedule.timesteps}"
            fields.refuse("model.low_scale.max_level", most, model.low_scale.max_level)
    for where, schedule in schedules.items():
        if schedule.beta_start > schedule.beta_end:
            fields.refuse(where, "beta_start up to beta_end", schedule)
    if model.image_conditioning is not None:
        _check_image_conditioning(parts)
    if model.preview is not None and len(model.preview.matrix) != model.latent.channels:
        rows = len(model.preview.matrix)
        fields.refuse("model.preview.matrix", f"{model.latent.channels} rows", rows)
    for name, part in parts.components.items():
        for where, twin, made_from in _twins(name, part):
            _check_twin(where, parts, part, twin, made_from)
    for name, target in parts.targets.items():
        for i, engine in enumerate(target.engines):
            _check_engine(f"targets.{name}.engines[{i}]", parts, target, engine)
    for i, record in enumerate(parts.parity):
        component = parts.components.get(record.component)
        if component is None or record.graph not in component.graphs:
            found = f"{record.component}/{record.graph}"
            fields.refuse(f"parity[{i}]", "a component and a graph of this bundle", found)


def _check_image_conditioning(parts: _Manifest) -> None:
    """The facts are those of the image tower."""
    facts = parts.model.image_conditioning
    if (tower := parts.components.get("image_encoder")) is None:
        raise MissingPart(
            "`model.image_conditioning` is about an image tower, and there is no component "
            f"`image_encoder`; there are {', '.join(parts.components)}",
            hint=fields.REWRITE,
        )
    taken = {t.name: t.shape for t in tower.inputs}.get("pixels", ())
    given = {t.name: t.shape for t in tower.outputs}.get("embedding", ())
    for name, expected, found in (
        ("size", taken[2:], (facts.size, facts.size)),
        ("embedding", given[1:], (facts.embedding,)),
    ):
        if expected != found:
            shown = f"what `image_encoder` has, {list(expected)}"
            fields.refuse(f"model.image_conditioning.{name}", shown, list(found))


def _twins(name: str, part: _Component) -> Iterator[tuple[str, _Twin, str]]:
    """(where it stands, the network, the path of the weights that it was made from)"""
    for precision, twin in part.quantised.items():
        yield f"components.{name}.quantised.{precision}", twin, part.weights
    for precision, twin in part.typed.items():
        quantised = part.quantised.get(precision)
        made_from = part.weights if quantised is None else quantised.weights
        yield f"components.{name}.typed.{precision}", twin, made_from


def _check_twin(
    where: str, parts: _Manifest, part: _Component, twin: _Twin, made_from: str
) -> None:
    """A second network takes and gives what the one does whose weights it was made from."""
    if twin.source != (source := parts.files[made_from].sha256):
        fields.refuse(f"{where}.source", f"the SHA-256 of {made_from}, {source}", twin.source)
    if sorted(twin.graphs) != sorted(part.graphs):
        fields.refuse(f"{where}.graphs", f"{', '.join(part.graphs)}", list(twin.graphs))
    for name, graph in twin.graphs.items():
        own = part.graphs[name]
        for what, found, expected in (
            ("inputs", graph.inputs, own.inputs),
            ("outputs", graph.outputs, own.outputs),
        ):
            found_by, expected_by = ({t.name: t for t in ts} for ts in (found, expected))
            _check_equal(f"{where}.graphs.{name}.{what}", found_by, expected_by)


def _check_engine(where: str, parts: _Manifest, target: _Target, engine: _Engine) -> None:
    """An engine is a file of its target, made of a typed graph that is here."""
    if engine.file not in target.files:
        fields.refuse(f"{where}.file", "one of the target's files", engine.file)
    part = parts.components.get(engine.component)
    typed = None if part is None else part.typed.get(engine.precision)
    graph = None if typed is None else typed.graphs.get(engine.graph)
    if graph is None:
        found = f"{engine.component}/{engine.graph} in {engine.precision}"
        fields.refuse(where, "a typed graph of this bundle", found)
    if set(engine.dims) != set(dims := named_dims(graph.inputs)):
        fields.refuse(f"{where}.dims", f"sizes of {', '.join(dims)}", list(engine.dims))


def _uses(parts: _Manifest) -> Iterator[tuple[str, str]]:
    """(path, the field that names it)"""
    yield parts.model.tokenizer.file, "model.tokenizer.file"
    for name, component in parts.components.items():
        yield component.weights, f"components.{name}.weights"
        for graph, record in component.graphs.items():
            yield record.file, f"components.{name}.graphs.{graph}.file"
        for where, twin, _ in _twins(name, component):
            yield twin.weights, f"{where}.weights"
            for graph, record in twin.graphs.items():
                yield record.file, f"{where}.graphs.{graph}.file"
    for name, target in parts.targets.items():
        for i, file in enumerate(target.files):
            yield file, f"targets.{name}.files[{i}]"


# A component: what it takes and gives, and what its graphs do


def _check_signature(name: str, part: _Component) -> None:
    where = f"components.{name}"
    if "full" not in part.graphs:
        raise MissingPart(
            f"`{where}.graphs` has no graph `full`; it has {', '.join(part.graphs) or 'none'}",
            hint=fields.REWRITE,
        )
    taken, given = SIGNATURES.get(name, (frozenset(), frozenset()))
    _check_names(f"{where}.inputs", taken, part.inputs)
    _check_names(f"{where}.outputs", given, part.outputs)
    inputs = {t.name: t for t in part.inputs}
    if (prologue := part.graphs.get("prologue")) is not None:
        early = {t.name: t for t in prologue.inputs}
        _check_equal(f"{where}.graphs.prologue.inputs", early, _only(inputs, early))
        inputs = {n: t for n, t in inputs.items() if n not in early}
        inputs |= {t.name: t for t in prologue.outputs}
    full = part.graphs["full"]
    _check_equal(f"{where}.graphs.full.inputs", {t.name: t for t in full.inputs}, inputs)
    _check_equal(
        f"{where}.graphs.full.outputs",
        {t.name: t for t in full.outputs},
        {t.name: t for t in part.outputs},
    )
    _check_cut(where, part)
    _check_bands(where, part)


def _check_bands(where: str, part: _Component) -> None:
    """The pieces lead from what the component takes to what it gives: each finds, in its channels,
    what those before it left (docs/bundle-format.md)."""
    found = {name for name in part.graphs if is_band(name)}
    if not found:
        return
    outer = [f"outer{k}" for k in range(len(found) - 1)]
    if found != {"inner", *outer} or not outer:
        fields.refuse(
            f"{where}.graphs", f"inner and outer0 to outer{len(found) - 2}", sorted(found)
        )
    begins = part.graphs["inner"].inputs == part.inputs
    taken, given = part.inputs[0], part.outputs[0]
    held = {(taken.name if begins else "x"): _channels(taken)}
    statistics = False
    for name in ["inner", *outer] if begins else [*outer, "inner"]:
        graph = part.graphs[name]
        takes, makes = ({t.name: _channels(t) for t in ts} for ts in (graph.inputs, graph.outputs))
        takes.pop("statistics" if statistics else "", None)
        if odd := [n for n, channels in takes.items() if held.get(n) != channels]:
            here = ", ".join(f"{n} of {c} channels" for n, c in held.items())
            more = " and statistics" if statistics else ""
            fields.refuse(f"{where}.graphs.{name}.inputs", f"some of {here}{more}", odd)
        if "h" in makes:
            held = {**({"skip": held["x"]} if "x" in held else {}), **makes}
        elif "seen" not in makes:
            held = makes
        statistics = name != "inner"
    if held != {given.name: _channels(given)}:
        fields.refuse(f"{where}.graphs", f"pieces that end at {given}", list(held))


def _channels(tensor: TensorSpec) -> Dim | None:
    return tensor.shape[1] if len(tensor.shape) > 1 else None


def _check_cut(where: str, part: _Component) -> None:
    """`deep` is `full` and gives features; `shallow<k>` takes features<k>, and of the prologue's
    results those that it needs."""
    full, deep = part.graphs["full"], part.graphs.get("deep")
    taken, given = ({t.name: t for t in tensors} for tensors in (full.inputs, full.outputs))
    features: dict[str, TensorSpec] = {}
    if deep is not None:
        _check_equal(f"{where}.graphs.deep.inputs", {t.name: t for t in deep.inputs}, taken)
        features = {t.name: t for t in deep.outputs if t.name not in given}
        found = {t.name: t for t in deep.outputs}
        _check_equal(f"{where}.graphs.deep.outputs", found, {**given, **features})
        if odd := [n for n in features if not _FEATURES.fullmatch(n)]:
            fields.refuse(f"{where}.graphs.deep.outputs", "further ones called features<k>", odd)
    for name, graph in part.graphs.items():
        if (number := _SHALLOW.fullmatch(name)) is None:
            continue
        found = {t.name: t for t in graph.inputs}
        cached = f"features{number[1]}"
        if cached not in features:
            fields.refuse(f"{where}.graphs.{name}", f"a graph `deep` that gives {cached}", name)
        own = {t.name: t for t in part.inputs if t.name in taken}
        expected = {**_only(taken, found), **own, cached: features[cached]}
        _check_equal(f"{where}.graphs.{name}.inputs", found, expected)
        outputs = {t.name: t for t in graph.outputs}
        _check_equal(f"{where}.graphs.{name}.outputs", outputs, given)


def _only(tensors: Mapping[str, TensorSpec], names: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {n: t for n, t in tensors.items() if n in names}


def _check_names(where: str, needed: frozenset[str], found: tuple[TensorSpec, ...]) -> None:
    if missing := needed - {t.name for t in found}:
        fields.refuse(where, f"the tensors {', '.join(sorted(needed))}", sorted(missing))


def _check_equal(
    where: str, found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> None:
    if found != expected:
        odd = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
        raise BadManifest(
            f"`{where}` differs from the component's own in {', '.join(odd)}: expected "
            f"{_listed(expected)}; found {_listed(found)}",
            hint=fields.REWRITE,
        )


def _listed(tensors: Mapping[str, TensorSpec]) -> str:
    return ", ".join(map(str, tensors.values()))


# The files


def _locate(folder: Path, name: str) -> Path:
    """The regular file, whose links stay inside the folder."""
    file = folder / name
    try:
        mode = os.stat(file).st_mode
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        outside = not Path(os.path.realpath(file)).is_relative_to(folder)
        if outside:
            raise _leaves(file) from error
        raise MissingPart(
            f"{file} is not there, but the manifest lists it",
            hint="copy the bundle again, whole, or export the model again",
        ) from error
    if not real.is_relative_to(folder):
        raise _leaves(file)
    if not stat.S_ISREG(mode):
        raise CorruptPart(
            f"{file} is not a file; the manifest lists it as one",
            hint="copy the bundle again, or export the model again",
        )
    return file


def _leaves(file: Path) -> UnsafePath:
    return UnsafePath(
        f"{file} is a link that leads out of the bundle, to {os.path.realpath(file)}",
        hint="put the file itself in the link's place, if you trust it",
    )


def _check_files(parts: _Manifest, files: Mapping[str, Path], verify: bool) -> None:
    """Sizes first: they cost nothing and tell a cut copy from a changed one."""
    for name, record in parts.files.items():
        size = files[name].stat().st_size
        if size != record.size:
            raise CorruptPart(
                f"{files[name]} has {size} bytes; the manifest says {record.size}",
                hint="the copy was cut short or changed: copy the bundle again, or export again",
            )
    networks: list[_Component | _Twin] = [*parts.components.values()]
    networks += [t for n, c in parts.components.items() for _, t, _ in _twins(n, c)]
    conditioning = parts.model.image_conditioning
    if conditioning is not None and conditioning.statistics:
        _check_statistics(files[parts.components["image_encoder"].weights], conditioning.embedding)
    graphs = {g.file for n in networks for g in n.graphs.values()}
    for name, record in parts.files.items():
        file = files[name]
        digest = sha256_of(file) if name in graphs else remembered_sha256(file, again=verify)
        if digest != record.sha256:
            raise CorruptPart(
                f"{files[name]} has SHA-256 {digest[:16]}...; the manifest says "
                f"{record.sha256[:16]}...",
                hint="the file was changed: copy the bundle again, or export the model again",
            )
    for network in networks:  # kept by this hash, which is now known to be the file's
        totals(files[network.weights], parts.files[network.weights].sha256)


def _check_statistics(file: Path, width: int) -> None:
    stored = read_header(file)
    for name in STATISTICS:
        if name not in stored or (stored[name].dtype, stored[name].shape) != ("F32", (width,)):
            here = stored.get(name)
            found = "nothing" if here is None else f"{here.dtype} {list(here.shape)}"
            raise CorruptPart(
                f"{file}: the manifest promises {name}, float32 [{width}]; found {found}",
                hint="export the model again, with --embedding-stats FILE",
            )


# The result


def _assemble(folder: Path, manifest: Any, parts: _Manifest, files: Mapping[str, Path]) -> Bundle:
    token = parts.model.tokenizer
    facts = ModelFacts(
        **{
            **vars(parts.model),
            "tokenizer": TokenizerFacts(token.start, token.end, token.pad, token.length),
        }
    )
    components = {
        name: _component(name, part, parts, files) for name, part in parts.components.items()
    }
    targets = {
        name: Target(name, t.precisions, tuple(files[f] for f in t.files))
        for name, t in parts.targets.items()
    }
    identity = {k: manifest[k] for k in ("format", "model", "components", "files")}
    return Bundle(
        path=folder,
        id=_digest(identity)[:16],
        producer=parts.producer,
        facts=facts,
        components=MappingProxyType(components),
        targets=MappingProxyType(targets),
        parity=parts.parity,
        files=parts.files,
        tokenizer_file=files[token.file],
    )


def _component(
    name: str, part: _Component, parts: _Manifest, files: Mapping[str, Path]
) -> Component:
    spec = ComponentSpec(name, part.inputs, part.outputs)
    quantised = {p: _network(spec, t, part.config, parts, files) for p, t in part.quantised.items()}
    typed = {
        p: replace(
            _network(spec, t, part.config, parts, files), engines=_engines(name, p, parts, files)
        )
        for p, t in part.typed.items()
    }
    own = _network(spec, part, part.config, parts, files)
    return replace(own, quantised=MappingProxyType(quantised), typed=MappingProxyType(typed))


def _engines(
    component: str, precision: Precision, parts: _Manifest, files: Mapping[str, Path]
) -> tuple[Engine, ...]:
    return tuple(
        Engine(target, e.graph, files[e.file], e.sm, e.dims, e.version, e.fingerprint)
        for target, described in parts.targets.items()
        for e in described.engines
        if (e.component, e.precision) == (component, precision)
    )


def _network(
    spec: ComponentSpec,
    part: _Component | _Twin,
    config: Mapping[str, Any],
    parts: _Manifest,
    files: Mapping[str, Path],
) -> Component:
    records = parts.files
    graphs = {
        n: Graph(n, files[g.file], records[g.file].sha256, g.inputs, g.outputs, g.macs)
        for n, g in part.graphs.items()
    }
    weights_sha256 = records[part.weights].sha256
    key = _digest(
        {
            "weights": weights_sha256,
            "graphs": {n: g.sha256 for n, g in graphs.items()},
            "inputs": [str(t) for t in spec.inputs],
            "outputs": [str(t) for t in spec.outputs],
        }
    )
    return Component(
        spec=spec,
        graphs=MappingProxyType(graphs),
        weights=files[part.weights],
        weights_sha256=weights_sha256,
        config=config,
        key=key,
    )


def _digest(value: Any) -> str:
    """SHA-256 of canonical JSON: sorted keys, no spaces, everything beyond ASCII escaped."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    ).hexdigest()
