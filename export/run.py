"""The trip of a checkpoint: weights, reference run, graphs, parity, targets, bundle.

checked by  tests/parity/test_export.py
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..engine.bundle import MANIFEST, Bundle, ModelFacts, ParityRecord, open_bundle
from ..engine.errors import BackendUnavailable, BundleError, StorageError, UnknownName
from ..engine.ports import Backend
from ..engine.safety import COMPONENT as CLASSIFIER
from ..engine.spec import PRECISIONS, Component, Precision
from ..engine.tokenizer import Tokenizer
from . import classifier, write
from .checkpoint import Checkpoint, open_checkpoint
from .components import CUTS, Part, parts
from .graphs import WEIGHTS, Place, build_graphs
from .parity import GATES, Gate, judge
from .quantize import QUANTISED, quantise_all
from .quantize import recipe as recipe_of
from .record import NATIVE, PROMPTS, Case, Recording, record
from .repro import keep_repro, link
from .targets import Recipe
from .targets import get as get_target
from .vocabulary import NAME as VOCABULARY
from .vocabulary import copy_vocabulary
from .weights_file import nbytes, write_weights

log = logging.getLogger("sdengine.export")

Report = Callable[[str, float], None]
TOKENIZER = f"tokenizer/{VOCABULARY}"
PORTABLE = "openvino"  # judges the portable graphs: the one engine of the base installation
SECOND = "onnxruntime"  # judges them too, where it is installed
WHOLE = "torch"  # runs networks of its own, not graphs: it has no classifier
LARGE = 1 << 30  # bytes of weights


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    targets: Sequence[str] = ("openvino",),
    precisions: Sequence[Precision] = ("bf16",),
    licence: str | None = None,
    name: str | None = None,
    gates: Mapping[Precision, Gate] | None = None,
    cuts: Sequence[int] = CUTS,
    tiles: bool = True,
    force: bool = False,
    prompts: Sequence[str] | None = None,
    progress: Report | None = None,
) -> Path:
    """Turn a checkpoint into a bundle at `out`; returns `out`.

    targets     engines that the bundle is made ready for; each is judged in float32 and in
                those of `precisions` that it and this machine have
    gates       what parity must reach; GATES where a precision is absent
    cuts        where the UNet is cut for a feature cache; none at all makes a smaller bundle
    tiles       cut the VAE at its norms too, for tiles that give what the whole gives
    force       replace a bundle of another checkpoint
    prompts     what int8 is calibrated on; None: a built-in list. int8 is added to the finished
                bundle: where its gate refuses it, the other precisions stay
    progress    called with what is being done, and the share that is done, 0..1
    raises      UnknownName, CheckpointError, TraceError, ParityFailure, StorageError, BackendError
    """
    recipes = [get_target(t) for t in targets]
    _check_precisions(precisions)
    report: Report = progress if progress is not None else (lambda text, share: None)
    facts = replace(
        checkpoint.facts,
        name=checkpoint.facts.name if name is None else name,
        licence=checkpoint.facts.licence if licence is None else licence,
    )
    out = out.absolute()
    if not write.is_free(out):
        bundle = _same_bundle(out, facts, force)
        if bundle is not None:
            missing = [r for r in recipes if not _has(bundle, r, precisions)]
            if missing:
                names = [r.name for r in missing]
                return add_target(out, names, precisions, gates, report, prompts)
            log.info("%s was made from the same checkpoint: it stays as it is", out)
            return out
    described = parts(facts, checkpoint.configs, cuts, tiles)
    wanted = {p.name: [checkpoint.tensors[n] for n in p.tensor_names()] for p in described}
    needed = sum(nbytes(refs) for refs in wanted.values())
    with write.partial_folder(out, needed) as folder:
        report("vocabulary and weights", 0.0)
        copy_vocabulary(checkpoint.path, folder / TOKENIZER)
        places = {}
        for part in described:
            report(f"weights of {part.name}", 0.02)
            home = folder / part.name
            home.mkdir()
            places[part.name] = Place(home, write_weights(home / WEIGHTS, wanted[part.name]))
        floats = [p for p in precisions if p not in QUANTISED]
        judging = _Judging(out, facts, recipes, floats, {**GATES, **(gates or {})})
        judging.record(
            described,
            {n: p.weights for n, p in places.items()},
            folder / TOKENIZER,
            _within(report, 0.08, 0.35),
        )
        components: dict[str, Component] = {}
        for i, part in enumerate(described):
            now = 0.35 + 0.6 * i / len(described)
            report(f"tracing {part.name}", now)
            judge_stage = partial(judging.stage, report=partial(_at, report, now))
            components[part.name] = build_graphs(part, places[part.name], judge_stage)
        made = {r.name: r.build(folder, components) for r in recipes}
        report("writing", 0.96)
        content = write.manifest(
            folder,
            facts,
            TOKENIZER,
            {n: _described(folder, c) for n, c in components.items()},
            {
                r.name: {
                    "precisions": judging.precisions(r),
                    "files": [f.relative_to(folder).as_posix() for f in made[r.name]],
                }
                for r in recipes
            },
            judging.records,
            {f"{n}/{WEIGHTS}": p.weights_sha256 for n, p in places.items()},
        )
        write.finish(folder, out, content)
    if floats != list(precisions):
        add_target(out, targets, [p for p in precisions if p in QUANTISED], gates, report, prompts)
    report("done", 1.0)
    return out


def _cuts(bundle: Bundle) -> list[int]:
    """Of the shallow graphs that it has."""
    names = bundle.components["unet"].graphs
    return [int(name.removeprefix("shallow")) for name in names if name.startswith("shallow")]


def add_target(
    path: Path,
    targets: Sequence[str],
    precisions: Sequence[Precision] = ("bf16",),
    gates: Mapping[Precision, Gate] | None = None,
    progress: Report | None = None,
    prompts: Sequence[str] | None = None,
    search_s: float | None = None,
) -> Path:
    """Make an existing bundle ready for further engines or precisions; returns `path`.

    The new bundle is a sibling whose files are links to the same content, and takes the old one's
    place by two renames: who reads the old one goes on reading it.
    prompts     what int8 is calibrated on; None: a built-in list
    search_s    seconds for measuring which layers int8 leaves in float; None: by rule
    raises      UnknownName, BundleError, ParityFailure, StorageError, BackendError
    """
    recipes = [get_target(t) for t in targets]
    _check_precisions(precisions)
    report: Report = progress if progress is not None else (lambda text, share: None)
    path = path.absolute()
    bundle = open_bundle(path)
    tiles = "inner" in bundle.component("vae_decoder").graphs
    described = parts(bundle.facts, open_checkpoint(path).configs, _cuts(bundle), tiles)
    quantises = any(p in r.precisions for r in recipes for p in precisions if p in QUANTISED)
    proved = {n: t.precisions for n, t in bundle.targets.items()} if quantises else {}
    judging = _Judging(path, bundle.facts, recipes, precisions, {**GATES, **(gates or {})}, proved)
    weights = {n: c.weights for n, c in bundle.components.items()}
    judging.record(described, weights, bundle.tokenizer_file, _within(report, 0.0, 0.4))
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    replaced = _twin_files(bundle) if quantises else set()
    room = sum(w.stat().st_size for w in weights.values()) if quantises else 0
    with write.partial_folder(path, room) as folder:
        for name in set(bundle.files) - replaced:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link(path / name, folder / name)
        components = bundle.components
        if quantises:
            components = quantise_all(
                bundle, folder, prompts, judging.cases, _within(report, 0.4, 0.8), search_s
            )
            _describe_twins(content, folder, components, replaced)
        for i, component in enumerate(components.values()):
            report(f"parity of {component.spec.name}", 0.8 + 0.15 * i / len(components))
            judging.targets(component)
        for recipe in recipes:
            made = recipe.build(folder, components)
            old = content["targets"].get(recipe.name, {"precisions": [], "files": []})
            new = judging.precisions(recipe)
            content["targets"][recipe.name] = {
                "precisions": new + [p for p in old["precisions"] if p not in new],
                "files": [f.relative_to(folder).as_posix() for f in made],
            }
            content["files"] |= write.listed(folder, made)
        content["parity"] = _merged(content["parity"], [asdict(r) for r in judging.records])
        write.finish(folder, path, content)
    report("done", 1.0)
    return path


def add_classifier(
    path: Path, found: classifier.Classifier, progress: Report | None = None
) -> Path:
    """Give an existing bundle a classifier, in the place of one that it has; returns `path`.

    It is judged on every target of the bundle that runs graphs, in all its float precisions.
    raises  NotACheckpoint, BundleError, ExportError, ParityFailure, StorageError, BackendError
    """
    report: Report = progress if progress is not None else (lambda text, share: None)
    path = path.absolute()
    bundle = open_bundle(path)
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    content["files"] = {n: f for n, f in content["files"].items() if not _of_classifier(n)}
    with write.partial_folder(path, found.file.stat().st_size) as folder:
        for name in content["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link(path / name, folder / name)
        report("classifier", 0.1)
        component = classifier.build(found, folder / CLASSIFIER)
        expected = classifier.of_the_file(found, classifier.pictures(component.config))
        records = []
        for target, proved in bundle.targets.items():
            backend = get_target(target).backend()
            if target != WHOLE and backend.probe().ok:
                report(f"parity on {target}", 0.5)
                precisions = [p for p in proved.precisions if p in classifier.TOLERANCE]
                records += [classifier.judge(component, backend, p, expected) for p in precisions]
        content["components"][CLASSIFIER] = _described(folder, component)
        content["files"] |= write.listed(folder, [component.weights, component.graphs["full"].path])
        kept = [r for r in content["parity"] if r["component"] != CLASSIFIER]
        content["parity"] = kept + [asdict(r) for r in records]
        write.finish(folder, path, content)
    report("done", 1.0)
    return path


def _of_classifier(file: str) -> bool:
    return file.startswith(f"{CLASSIFIER}/")


def _twin_files(bundle: Bundle) -> set[str]:
    """Files of quantised networks, as the manifest spells them: they are written anew; and what was
    made of them, typed graphs and engines, goes."""
    parts = bundle.components.values()
    typed = [c.typed["int8"] for c in parts if "int8" in c.typed]
    twins = [*(t for c in parts for t in c.quantised.values()), *typed]
    files = [f for t in twins for f in (t.weights, *(g.path for g in t.graphs.values()))]
    files += [e.path for t in typed for e in t.engines]
    return {f.relative_to(bundle.path).as_posix() for f in files}


def _describe_twins(
    content: dict[str, Any], folder: Path, components: Mapping[str, Component], replaced: set[str]
) -> None:
    """Put the quantised networks of `components`, written to `folder`, into the manifest."""
    content["files"] = {n: f for n, f in content["files"].items() if n not in replaced}
    for target in content["targets"].values():
        target["files"] = [f for f in target["files"] if f not in replaced]
        if "engines" in target:
            target["engines"] = [e for e in target["engines"] if e["file"] not in replaced]
    for name, component in components.items():
        entry = content["components"][name]
        entry["quantised"] = {}
        entry.get("typed", {}).pop("int8", None)
        for precision, twin in component.quantised.items():
            described = _described(folder, twin)
            entry["quantised"][precision] = {
                "graphs": described["graphs"],
                "weights": described["weights"],
                "source": component.weights_sha256,
                "recipe": recipe_of(twin),
            }
            files = [twin.weights, *(g.path for g in twin.graphs.values())]
            hashes = {described["weights"]: twin.weights_sha256}
            content["files"] |= write.listed(folder, files, hashes)


class _Judging:
    """The recorded cases, the gates, and what was found with them so far."""

    def __init__(
        self,
        out: Path,
        facts: ModelFacts,
        recipes: Sequence[Recipe],
        precisions: Sequence[Precision],
        gates: Mapping[Precision, Gate],
        proved: Mapping[str, Sequence[Precision]] = MappingProxyType({}),
    ) -> None:
        """proved: target -> the precisions that are not judged again"""
        self.records: list[ParityRecord] = []
        self._proved = proved
        self._facts, self._recipes, self._gates = facts, recipes, gates
        self._asked = precisions
        self.cases: Recording = {}
        self._keep = partial(keep_repro, out)
        self._backends: dict[str, Backend] = {}
        for name in dict.fromkeys([PORTABLE, SECOND, *(r.name for r in recipes)]):
            backend = get_target(name).backend()
            if backend.probe().ok:
                self._backends[name] = backend
        for recipe in recipes:
            self._require(recipe.name)
        self._require(PORTABLE)

    def record(
        self,
        described: Sequence[Part],
        weights: Mapping[str, Path],
        vocabulary: Path,
        report: Report,
    ) -> None:
        tokenizer = Tokenizer(vocabulary, self._facts.tokenizer)
        ids = np.array([tokenizer.encode(p).ids for p in PROMPTS], np.int64)
        self.cases = record(described, weights, self._facts, ids, report)

    def stage(self, component: Component, stage: str, *, report: Callable[[str], None]) -> None:
        """Judge a component: in the making with one case, finished with all of them."""
        name = component.spec.name
        report(f"parity of {name}" + (f", {stage}" if stage else ""))
        cases = self.cases[name]
        small = [c for c in cases if c.name != NATIVE]
        if stage:
            self._run(component, PORTABLE, "f32", [small[len(small) // 2]], stage)
            return
        # OpenVINO holds float32 weights twice, ONNX Runtime whole attention matrices: at native
        # size a large network is left to the target's own, lower precision.
        large = component.weights.stat().st_size > LARGE
        lower = any(self.precisions(r) != ["f32"] for r in self._recipes)
        self._run(component, PORTABLE, "f32", small if large and lower else cases, "")
        if SECOND in self._backends:
            self._run(component, SECOND, "f32", small, "")
        self.targets(component)

    def targets(self, component: Component) -> None:
        """Judge a finished component on every target in every precision that was asked for."""
        if component.spec.name == CLASSIFIER:
            self._classifier(component)
            return
        cases = self.cases[component.spec.name]
        done = {(r.component, r.runtime, r.precision) for r in self.records if "(" not in r.case}
        for recipe in self._recipes:
            for precision in self.precisions(recipe):
                if precision in self._proved.get(recipe.name, ()) and precision not in QUANTISED:
                    continue
                if (component.spec.name, recipe.name, precision) not in done:
                    self._run(component, recipe.name, precision, cases, "")

    def _classifier(self, component: Component) -> None:
        """Against its float32 on the first runtime, which was judged when it was added."""
        expected = classifier.answers(component, self._backends[PORTABLE], "f32")
        for recipe in self._recipes:
            for precision in self.precisions(recipe):
                if recipe.name != WHOLE and precision in classifier.TOLERANCE:
                    backend = self._backends[recipe.name]
                    self.records.append(classifier.judge(component, backend, precision, expected))

    def precisions(self, recipe: Recipe) -> list[Precision]:
        """What a target is judged in: what was asked for and can be had, and float32."""
        here = self._backends[recipe.name].probe().precisions
        asked = [p for p in self._asked if p in recipe.precisions and p in here]
        return list(dict.fromkeys([*asked, "f32"]))

    def _run(
        self,
        component: Component,
        runtime: str,
        precision: Precision,
        cases: Sequence[Case],
        stage: str,
    ) -> None:
        self.records += judge(
            component,
            self._backends[runtime],
            precision,
            cases,
            self._gates[precision],
            stage=stage,
            keep=self._keep,
        )

    def _require(self, name: str) -> None:
        if name in self._backends:
            return
        probe = get_target(name).backend().probe()
        raise BackendUnavailable(
            f"parity cannot be checked on {name}: {probe.reason}",
            hint=probe.mend if probe.mend else "`sdengine doctor` lists what can run here",
        )


def _check_precisions(names: Sequence[str]) -> None:
    for name in names:
        if name not in PRECISIONS:
            raise UnknownName("precision", name, PRECISIONS)


def _same_bundle(out: Path, facts: ModelFacts, force: bool) -> Bundle | None:
    """The bundle at `out` if it is this checkpoint's; None if it may be replaced.

    raises      StorageError when something else is there
    """
    if not (out / MANIFEST).is_file():
        raise StorageError(
            f"{out} exists and is not a bundle; it was left alone",
            hint="choose another place with --out, or move it away",
        )
    try:
        bundle: Bundle | None = open_bundle(out)
    except BundleError as error:
        bundle, found = None, error.message
    else:
        assert bundle is not None, "open_bundle returns a bundle or raises"
        if _origin(bundle.facts) == _origin(facts):
            return None if force else bundle
        found = f"it was made from {bundle.facts.source.file}"
    if force:
        return None
    raise StorageError(
        f"{out} is taken by another bundle: {found}",
        hint="choose another place with --out, or replace it with --force",
    )


def _origin(facts: ModelFacts) -> tuple[Any, ...]:
    """What makes two exports the same: content and the facts that options decide."""
    return (
        facts.source.sha256,
        facts.source.weights,
        facts.prediction,
        facts.schedule,
        facts.latent,
        facts.low_scale,
        facts.image_conditioning,
    )


def _has(bundle: Bundle, recipe: Recipe, precisions: Sequence[Precision]) -> bool:
    target = bundle.targets.get(recipe.name)
    wanted = {p for p in precisions if p in recipe.precisions}
    here = set(recipe.backend().probe().precisions)
    return target is not None and wanted & here <= set(target.precisions)


def _described(folder: Path, component: Component) -> dict[str, Any]:
    """A component as the manifest has it."""
    return {
        "inputs": write.tensors(component.spec.inputs),
        "outputs": write.tensors(component.spec.outputs),
        "graphs": {
            name: {
                "file": g.path.relative_to(folder).as_posix(),
                "inputs": write.tensors(g.inputs),
                "outputs": write.tensors(g.outputs),
                **({} if g.macs is None else {"macs": g.macs}),
            }
            for name, g in component.graphs.items()
        },
        "weights": component.weights.relative_to(folder).as_posix(),
        "config": dict(component.config),
    }


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records, the newer one where two are about the same."""
    about = ("component", "graph", "runtime", "precision", "case", "output")
    by_subject = {tuple(r[k] for k in about): r for r in [*old, *new]}
    return list(by_subject.values())


def _at(report: Report, share: float, text: str) -> None:
    report(text, share)


def _within(report: Report, low: float, high: float) -> Report:
    return lambda text, share: report(text, low + (high - low) * share)
