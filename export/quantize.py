"""Eight-bit networks beside the others: `<component>/int8/`, graphs and weights of their own.

    runs of the checkpoint ──> activations seen ──> a grid for each layer's input ─┐
                               weights ──> int8, one scale an output channel ──────┴─> graphs

The UNet's and the decoder's layers compute in int8, unless what was seen says that this layer's
input does not fit 256 values; the other networks run once a picture: theirs are stored in int8 and
computed in float. One set of graphs, in ONNX's own terms, serves OpenVINO and ONNX Runtime.

fp8 goes the same way with other steps, for TensorRT alone: export/typed.py writes its graphs.

checked by  tests/parity/test_quantize.py, tests/parity/test_fp8.py
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..backends.cache import Store
from ..backends.openvino import OpenVINO
from ..engine.bundle import Bundle, ScheduleFacts
from ..engine.ports import Array, Floats
from ..engine.spec import Component, Graph, Precision, Profile
from ..engine.weights import read_header
from .calibration import PROMPTS, record_runs
from .containers import TensorRef, open_container
from .graph.count import by_node
from .graph.quantize import (
    E4M3,
    INT8,
    SCALE,
    Divisors,
    Grid,
    Grids,
    Layer,
    Steps,
    layers,
    quantized,
    rounded_weight,
    stored_tensors,
)
from .graph.tools import save
from .graph.upsampling import Part, on_small_maps
from .observe import Seen, grid, observe
from .parity import distance
from .record import NATIVE, Recording, free_memory
from .search import SAMPLES as NOISE_SAMPLES
from .search import measure, worst
from .smooth import Fit, fit
from .weights_file import write_weights

log = logging.getLogger("sdengine.export")

FOLDER = "int8"
WEIGHTS = "weights.safetensors"
COMPUTED = ("unet", "vae_decoder")  # the networks whose arithmetic is int8 too
LEAST_DB = {"vae_decoder": 38.0}  # PSNR of a picture: below it, the network computes in float
FLOOR_DB = 22.0  # signal to rounding noise of an activation: below it, its layer computes in float
FIRST, LAST = 1, 4  # layers at a network's ends that stay in float
OUTPUT, UP = "output_blocks.", ".conv/"  # .conv: the one behind an upsampling
QUANTISED: tuple[Precision, ...] = ("int8",)  # precisions that have weights of their own
FLOAT_SHARE = 0.15  # of all multiply-adds, that a search may leave in float
LARGE = 1 << 30  # bytes of weights: beyond it activations are seen in bfloat16
SAMPLES = 96  # recorded calls that activations are seen on

Feeds = Mapping[str, Array]
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Choice:
    """What was decided for one network.

    grids       layer -> the grids of its inputs; a layer that is absent computes in float
    divisors    layer -> what the channels of its input are divided by; those without grids are
                not looked at
    floats      layers whose weights stay as they were
    """

    grids: Grids
    divisors: Divisors = field(default_factory=dict)
    floats: frozenset[str] = frozenset()

    def with_parts(self, parts: Mapping[str, Part]) -> Choice:
        """What holds for a layer holds for its parts."""
        grids = {name: self.grids[part.layer] for name, part in parts.items()}
        divisors = {name: self.divisors[part.layer] for name, part in parts.items()
                    if part.layer in self.divisors}  # fmt: skip
        return Choice({**self.grids, **grids}, {**self.divisors, **divisors}, self.floats)

    def without(self, floats: frozenset[str]) -> Choice:
        """These layers in float, with the others as they are."""
        kept = {n: g for n, g in self.grids.items() if n not in floats}
        return Choice(kept, self.divisors, self.floats | floats)


@dataclass(frozen=True)
class Rule:
    """What stays in float beside a network's ends, by parts of LDM names.

    anywhere    everywhere
    output      in all of a UNet's output blocks
    levels      in the last output block of each level, coarse to fine: of the last ones of a UNet's
                levels these, of all before them the first
    first, last     where it comes first, or last
    """

    anywhere: tuple[str, ...]
    output: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


# By what makes most noise for its time, docs/numerics.md: for fp8 as int8 had it once.
_LEVEL = (".ff.net.2/", ".proj_in/", ".proj_out/")
_FINE = (*_LEVEL, ".ff.net.0.", ".to_out.", ".in_layers.", ".out_layers.", ".conv/")
RULES = {
    "int8": Rule(
        (".skip_connection/", ".attn2/MatMul"),
        output=(".ff.net.2/",),
        levels=(
            (".proj_in/",),
            (".proj_out/", ".ff.net.0.", ".to_out.", ".conv/"),
            (".proj_in/", ".proj_out/", ".ff.net.0.", ".to_out.", ".out_layers."),
        ),
        first=(".op/",),
        last=(".upsample.conv/",),
    ),
    "fp8": Rule((".skip_connection/", ".op/", ".attn2/MatMul"), (), (_LEVEL, _FINE, _FINE)),
}


@dataclass(frozen=True)
class Search:
    """How layers are looked for that should stay in float.

    seconds     when to stop measuring
    share       of all multiply-adds, that may be in float
    weight_of   what a squared error of this call's output counts
    """

    seconds: float
    share: float
    weight_of: Callable[[Feeds], float]


def quantise_all(
    bundle: Bundle,
    folder: Path,
    prompts: Sequence[str] | None,
    cases: Recording,
    report: Report,
    search_s: float | None = None,
) -> dict[str, Component]:
    """The components of a bundle with their int8 twins, written into `folder`.

    folder      where the bundle is being written anew
    prompts     what is drawn for calibration; None: PROMPTS
    cases       recorded inputs, taken where this model draws nothing from a prompt alone
    search_s    seconds for measuring which layers to leave in float; None: by rule
    raises      StorageError, BackendError
    """
    backend = OpenVINO(Store(limit=0))
    samples = calibration_samples(bundle, prompts, cases, backend, _within(report, 0.0, 0.3))
    search = None
    if search_s is not None:
        search = Search(search_s, FLOAT_SHARE, partial(noise_level, bundle.facts.schedule))
    result = {}
    for i, (name, component) in enumerate(bundle.components.items()):
        share = 0.3 + 0.7 * i / len(bundle.components)
        end = share + 0.7 / len(bundle.components)
        within = _within(report, share, end)
        result[name] = quantise(component, folder / name, samples[name], backend, within, search)
    return result


def calibration_samples(
    bundle: Bundle,
    prompts: Sequence[str] | None,
    cases: Recording,
    backend: OpenVINO,
    report: Report,
) -> dict[str, Sequence[Feeds]]:
    """What every network of a bundle is fed with in real runs; parameters as of `quantise_all`."""
    calls: Mapping[str, Sequence[Feeds]] = {}
    if bundle.facts.variant == "base":
        chosen = PROMPTS if prompts is None else prompts
        sizes = {n: c.weights.stat().st_size for n, c in bundle.components.items()}
        precision = drawing_precision(max(sizes.values()), backend)
        calls = record_runs(bundle, backend, precision, chosen, report)
    recorded = {n: [c.feeds for c in cases.get(n, ())] for n in bundle.components}
    return {**recorded, **calls}


def fp8_choices(
    bundle: Bundle, prompts: Sequence[str] | None, cases: Recording, report: Report
) -> dict[str, Choice]:
    """For each network that computes in fp8: grids from the runs that int8 is calibrated on, the
    same layers in float by rule, and the weights of all layers without a grid as they were."""
    backend = OpenVINO(Store(limit=0))
    samples = calibration_samples(bundle, prompts, cases, backend, _within(report, 0.0, 0.4))
    found = {}
    for name in COMPUTED:
        component = bundle.component(name)
        # what is largest counts alone: the recorded cases are looked at too
        seen = [c.feeds for c in cases.get(name, ()) if c.name != NATIVE]
        taken = [*spread(samples[name], SAMPLES), *seen]
        feeds = step_feeds(component, taken, backend)
        chosen = by_rule(component, fitted(component, feeds, backend, report, E4M3), E4M3)
        models = [ir.load(graph.path) for graph in component.graphs.values()]
        every = {la.name for m in models for la in layers(m) if la.weight is not None}
        found[name] = chosen.without(frozenset(every - set(chosen.grids)))
    return found


def quantise(
    component: Component,
    folder: Path,
    samples: Sequence[Feeds],
    backend: OpenVINO,
    report: Report,
    search: Search | None = None,
) -> Component:
    """The component with its int8 twin, written to `folder`/int8.

    folder      of the component, in a bundle that is being written
    samples     recorded feeds of the component; may be empty where nothing is computed in int8
    backend     runs the graphs on them, and judges the twin
    search      measure which of the UNet's layers to leave in float, instead of going by rule
    raises      StorageError, BackendError
    """
    name = component.spec.name
    choice = Choice({})
    if name in COMPUTED:
        report(f"activations of {name}", 0.0)
        feeds = step_feeds(component, spread(samples, SAMPLES), backend)
        every = fitted(component, feeds, backend, report)
        if search is not None and name == "unet":
            choice = searched(component, folder, every, feeds, search, report)
        else:
            choice = by_rule(component, every)
    report(f"int8 weights of {name}", 0.7)
    twin = write_twin(component, folder / FOLDER, choice)
    if choice.grids and name in LEAST_DB:
        found = worst_psnr(component, twin, spread(samples, 4), backend)
        log.info("%s: int8 pictures are at least %.1f dB from float", name, found)
        if found < LEAST_DB[name]:
            log.info(
                "%s: computes in float, from int8 weights: %g dB are due", name, LEAST_DB[name]
            )
            twin = write_twin(component, folder / FOLDER, Choice({}))
    return replace(component, quantised={**component.quantised, "int8": twin})


def fitted(
    component: Component,
    feeds: Sequence[Feeds],
    backend: OpenVINO,
    report: Report,
    steps: Steps = INT8,
) -> Choice:
    """Grids and divisors for the layers of `full`, by what their inputs were on these feeds."""
    graph = component.graphs["full"]
    found = [layer for layer in products(graph) if _in_time(layer)]
    seen = observe(
        graph.path,
        {n: channel_axis(layer) for layer in found for n in layer.inputs},
        feeds,
        drawing_precision(component.weights.stat().st_size, backend),
        lambda share: report(f"activations of {component.spec.name}", 0.5 * share),
    )
    stored = open_container(component.weights).tensors
    sharing: dict[tuple[str, str], list[Layer]] = {}
    for layer in found:
        if layer.weight is not None:
            sharing.setdefault((layer.inputs[0], layer.op), []).append(layer)
    grids: dict[str, tuple[Grid, ...]] = {}
    divisors: dict[str, Floats] = {}
    for layer in found:
        if layer.weight is None:
            found_grids = (grid(seen[n], symmetric=True, steps=steps) for n in layer.inputs)
            grids[layer.name] = tuple(found_grids)
    for (name, _), users in sharing.items():
        weights = [_floats(stored[str(layer.weight)]) for layer in users]
        chosen = fitting(users[0], seen[name], weights, steps)
        for layer in users:
            if -10 * np.log10(max(chosen.noise, 1e-30)) < FLOOR_DB:
                log.info("%s stays in float: 8 bits lose too much of its input", layer.name)
                continue
            grids[layer.name] = (chosen.grid,)
            if chosen.divisors is not None:
                divisors[layer.name] = chosen.divisors
    return Choice(grids, divisors)


def by_rule(component: Component, every: Choice, steps: Steps = INT8) -> Choice:
    """In float what makes most noise for its multiply-adds: the network's ends, and of a UNet
    what no later layer smooths before its level ends."""
    rule = RULES[steps.name]
    found = products(component.graphs["full"])
    order = [layer.name for layer in found]
    weighted = [layer.name for layer in found if layer.weight is not None and _in_time(layer)]
    floats = {*weighted[:FIRST], *weighted[-LAST:]}
    floats |= {n for n in order for part in rule.anywhere if part in n}
    floats |= {n for n in order if n.startswith(OUTPUT) for part in rule.output if part in n}
    floats |= {n for part in rule.first for n in [n for n in order if part in n][:1]}
    floats |= {n for part in rule.last for n in [n for n in order if part in n][-1:]}
    for block, parts in _ending(order, rule).items():
        within = [n for n in order if n.startswith(f"{OUTPUT}{block}.")]
        floats |= {n for n in within for part in parts if part in n}
    return every.without(frozenset(floats))


def _ending(order: Sequence[str], rule: Rule) -> dict[int, tuple[str, ...]]:
    """Output blocks that end a level of resolution, and what of each stays in float."""
    blocks = {n: int(n.split(".")[1]) for n in order if n.startswith(OUTPUT)}
    ends = sorted({b for n, b in blocks.items() if UP in n} | set(sorted(blocks.values())[-1:]))
    before = [rule.levels[0]] * (len(ends) - len(rule.levels))
    levels = (*before, *rule.levels)
    return dict(zip(ends[::-1], levels[::-1], strict=False))


def searched(
    component: Component,
    folder: Path,
    every: Choice,
    feeds: Sequence[Feeds],
    search: Search,
    report: Report,
) -> Choice:
    """The layers in float that measuring finds to be worst for their cost."""
    graph = component.graphs["full"]
    order = [layer for layer in products(graph) if layer.name in every.grids]
    twin = write_twin(component, folder / FOLDER, every, small_maps=False)
    noise = measure(
        folder / graph.path.name,
        twin.weights,
        order,
        every.grids,
        every.divisors,
        spread(feeds, NOISE_SAMPLES),
        search.weight_of,
        search.seconds,
        lambda share: report("sensitivity of each layer", 0.5 + 0.2 * share),
    )
    dims = {d: n for t in graph.inputs
            for d, n in zip(t.shape, feeds[0][t.name].shape, strict=True)
            if isinstance(d, str)}  # fmt: skip
    counted = by_node(ir.load(graph.path), dims)
    floats = frozenset(worst(noise, {la.name: counted[la.name] for la in order}, search.share))
    left = sum(n for name, n in noise.layers.items() if name not in floats)
    share = 1 - left / sum(noise.layers.values())
    log.info("%d layers stay in float: they made %.0f %% of the noise", len(floats), 100 * share)
    return every.without(floats)


def products(graph: Graph) -> list[Layer]:
    """The layers that may compute in int8, in order of use: all but an attention's second product,
    whose probabilities are far below 1/255 where there are thousands of tokens."""
    found = layers(ir.load(graph.path))
    return [layer for layer in found if layer.weight is not None or layer.scores]


def fitting(layer: Layer, seen: Seen, weights: Sequence[Floats], steps: Steps = INT8) -> Fit:
    """A convolution reads SiLU, nearly all positive: about zero it would waste half of the values.
    A product of matrices is computed faster about zero; its grid does not end within what was seen:
    other prompts go beyond that."""
    if layer.op == "Conv":
        return fit(seen, weights, symmetric=steps is not INT8, steps=steps)
    return fit(seen, weights, symmetric=True, shares=(1.0,), steps=steps)


def channel_axis(layer: Layer) -> int:
    return 1 if layer.op == "Conv" else -1


def step_feeds(component: Component, samples: Sequence[Feeds], backend: OpenVINO) -> list[Feeds]:
    """Feeds of `full` for feeds of the component: the prologue's results in place of the text."""
    full, prologue = component.graphs["full"], component.graphs.get("prologue")
    wanted = [t.name for t in full.inputs]
    if prologue is None:
        return [{n: sample[n] for n in wanted} for sample in samples]
    network = backend.compile(component, prologue, Profile())
    run = network.open({})
    taken = [t.name for t in prologue.inputs]
    result = []
    for sample in samples:
        known = {**sample, **run({n: np.ascontiguousarray(sample[n]) for n in taken})}
        result.append({n: known[n] for n in wanted})
    network.close()
    return result


def noise_level(schedule: ScheduleFacts, feeds: Feeds) -> float:
    """sigma^2 at the call's timestep: what an error of the output weighs in the guess at x0."""
    s = schedule
    betas = np.linspace(s.beta_start**0.5, s.beta_end**0.5, s.timesteps) ** 2
    place = int(np.clip(np.rint(feeds["timestep"].flat[0]), 0, s.timesteps - 1))
    return float(1 - np.cumprod(1 - betas)[place])


def drawing_precision(weights: int, backend: OpenVINO) -> Precision:
    """float32, or for a large network bfloat16 where that is to be had: half time and memory."""
    return "bf16" if weights > LARGE and "bf16" in backend.probe().precisions else "f32"


def write_twin(
    component: Component, folder: Path, choice: Choice, *, small_maps: bool = True
) -> Component:
    """Graphs and weights of a component whose layers have int8 weights, all but `choice.floats`.

    small_maps      compute convolutions behind an upsampling before it
    """
    folder.mkdir(parents=True, exist_ok=True)
    models, parts = {}, {}
    for name, graph in component.graphs.items():
        chosen = choice.grids if small_maps else ()
        models[name], found = on_small_maps(ir.load(graph.path), chosen)
        parts |= found
    choice = choice.with_parts(parts)
    refs = rounded_weights(component, models, choice, INT8, parts)
    weights_sha256 = write_weights(folder / WEIGHTS, refs)
    header = read_header(folder / WEIGHTS)
    graphs = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        twin = quantized(model, choice.grids, header, location=WEIGHTS, divisors=choice.divisors)
        save(twin, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        graphs[name] = replace(component.graphs[name], path=path, sha256=sha256)
    content = {"weights": weights_sha256, "graphs": {n: g.sha256 for n, g in graphs.items()}}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    free_memory()
    return replace(
        component,
        graphs=graphs,
        weights=folder / WEIGHTS,
        weights_sha256=weights_sha256,
        key=key,
        quantised={},
    )


def rounded_weights(
    component: Component,
    models: Mapping[str, ir.Model],
    choice: Choice,
    steps: Steps,
    parts: Mapping[str, Part] = MappingProxyType({}),
) -> list[TensorRef]:
    """All weights that the models take, those of layers outside `choice.floats` in steps.

    parts       layers of the models that are a part of one of the component's
    """
    rounded: dict[str, Floats | None] = {}
    computed: dict[str, list[tuple[str, Part]]] = {}
    taken = set().union(*(stored_tensors(model) for model in models.values()))
    for layer in (layer for model in models.values() for layer in layers(model)):
        if layer.weight is None or layer.name in choice.floats or layer.weight in rounded:
            continue
        grids = choice.grids.get(layer.name)
        rounded[layer.weight] = None if grids is None else choice.divisors.get(layer.name)
        if (part := parts.get(layer.name)) is not None:
            computed.setdefault(part.weight, []).append((layer.weight, part))
    refs: list[TensorRef] = []
    for name, tensor in open_container(component.weights).tensors.items():
        if name in rounded:
            refs += _rounded(tensor, rounded[name], steps)
        elif name in taken or name not in computed:
            refs.append(tensor)
        for weight, part in computed.get(name, ()):
            refs += _rounded(tensor, rounded[weight], steps, weight, part)
    return refs


def recipe(component: Component) -> dict[str, Any]:
    """What the twin's manifest entry says of how it was made: layers by what they compute in."""
    model = ir.load(component.graphs["full"].path)
    found = [layer for layer in layers(model) if layer.weight is not None]
    computed = [layer.name for layer in found if _rounds(model, layer)]
    return {
        "weights": "int8, symmetric, one scale an output channel",
        "activations": "8 bits, one scale a tensor" if computed else "float",
        "int8_layers": len(computed),
        "float_layers": [layer.name for layer in found if layer.name not in computed],
    }


def worst_psnr(
    component: Component, twin: Component, samples: Iterable[Feeds], backend: OpenVINO
) -> float:
    """The least PSNR of the twin's results, against the component's own in float32."""
    worst = np.inf
    precisions: tuple[Precision, ...] = ("f32", "int8")
    for sample in samples:
        dims = {d: n for t in component.spec.inputs
                for d, n in zip(t.shape, sample[t.name].shape, strict=True)
                if isinstance(d, str)}  # fmt: skip
        results = []
        for network, precision in zip((component, twin), precisions, strict=True):
            session = backend.load(network, Profile(dims, precision))
            results.append(session(sample))
            session.close()
        for name, reference in results[0].items():
            worst = min(worst, distance(reference, results[1][name]).psnr_db)
    return worst


def spread(samples: Sequence[Feeds], count: int) -> list[Feeds]:
    """`count` of the samples, evenly over all; all of them where there are no more."""
    if len(samples) <= count:
        return list(samples)
    places = np.linspace(0, len(samples) - 1, count).round().astype(int)
    return [samples[i] for i in places]


def _rounded(
    tensor: TensorRef,
    by: Floats | None,
    steps: Steps,
    name: str | None = None,
    part: Part | None = None,
) -> list[TensorRef]:
    """A weight in steps, and their scales; computed when written.

    by          what its input channels are multiplied by, [C]
    name, part  of what is made of it, where the layer is one of four
    """
    name = tensor.name if name is None else name
    shape = tensor.shape if part is None else (*tensor.shape[:2], 2, 2)

    def found() -> tuple[np.ndarray, Floats]:
        weight = _floats(tensor) if part is None else part.of(_floats(tensor))
        factors = 1 if by is None else by.reshape(-1, *[1] * (weight.ndim - 2))
        return rounded_weight(weight * factors, steps)

    def values() -> Any:
        return found()[0].reshape(-1).view(np.uint8)

    def scales() -> Any:
        return found()[1].view(np.uint8)

    return [
        TensorRef(name, steps.stored, shape, values),
        TensorRef(name + SCALE, "F32", shape[:1], scales),
    ]


def _floats(tensor: TensorRef) -> Floats:
    result: Floats = tensor.torch().to(torch.float32).numpy()
    return result


def _in_time(layer: Layer) -> bool:
    """Not the little that is computed from the time alone: one row, and every block hangs on it."""
    return ".emb_layers." not in layer.name and not layer.name.startswith("time_embed.")


def _rounds(model: ir.Model, layer: Layer) -> bool:
    node = next(n for n in model.graph if n.name == layer.name)
    first = node.inputs[0]
    producer = None if first is None else first.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _within(report: Report, low: float, high: float) -> Report:
    return lambda text, share: report(text, low + (high - low) * share)
