"""A model file or folder -> tensors under LDM names, configs of the networks, facts.

    .safetensors, .ckpt ─┐                 ┌─ sizes     shapes + config -> networks' configs
    diffusers folder ────┼─> tensors, ─────┼─ expected  missing, unexpected, wrong: refused
    bundle ──────────────┘   Stated        └─ facts     variant, eps or v, betas, scale, sizes

Nothing is read but headers until somebody asks a TensorRef for its bytes.

checked by  tests/unit/checkpoint
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..engine.bundle import ModelFacts, SourceFacts
from ..engine.errors import NotACheckpoint
from ..engine.hashes import Progress
from . import digests
from .companions import companion_configs, with_statistics
from .containers import EXPECTED, TensorRef, cannot_read, file_kind, open_container
from .expected import expected_shapes, select
from .facts import decide_prediction, model_facts, schedule_facts
from .folders import INDEX, MANIFEST, open_bundle_folder, open_diffusers
from .sizes import text_config, unet_config, vae_config
from .stated import Stated, read_config
from .variants import find_variant, refuse_others

Kind = Literal["ckpt", "safetensors", "diffusers", "bundle"]
Weights = Literal["ema", "plain"]

_log = logging.getLogger(__name__)
_EMA = "model_ema."
_EMA_REAL = 100  # an averaged copy has hundreds of tensors; files without one keep two counters


@dataclass(frozen=True)
class Checkpoint:
    """A model, checked, and not read yet.

    sha256      of the content: of the file, or over names and contents of the files that are used
    configs     "unet", "vae", "text": what `UNetConfig.from_ldm` and its like take; "depth",
                "image_encoder" where the model has one: what `from_dict` takes
    tensors     by LDM name, in the networks' order: those that the networks need, then what else
                lies beside a variant's companions (schedules, statistics, a text half)
    decided     fact -> what decided it
    """

    path: Path
    kind: Kind
    sha256: str
    facts: ModelFacts
    configs: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, TensorRef]
    decided: Mapping[str, str]


@dataclass(frozen=True)
class _Raw:
    """A model as it was found, before any check."""

    kind: Kind
    tensors: Mapping[str, TensorRef]
    weights: Weights
    stated: Stated
    files: tuple[Path, ...]
    licence: str | None
    source: Mapping[str, Any]


def open_checkpoint(
    path: Path,
    *,
    prediction: str | None = None,
    config: Path | None = None,
    ema: bool = True,
    embedding_stats: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open and check a model.

    path        .safetensors, .ckpt, diffusers folder or bundle; told apart by content
    prediction  "eps" or "v", over every other source
    config      LDM yaml, JSON of the same facts, or a diffusers scheduler config; it goes over
                the yaml beside the model and a folder's own configs
    ema         take averaged weights where the file has them
    embedding_stats
                mean and deviation of the image embedding, for unCLIP: Karlo's ViT-L-14_stats.th,
                or a .safetensors file with the vectors mean and std
    progress    called with (bytes done, bytes in all) of each file that is hashed
    raises      CheckpointError, StorageError; RequestError for an unknown prediction, and for
                statistics that the model has no use for
    """
    raw = _find(path, ema)
    if config is not None:
        raw = replace(raw, stated=read_config(config).over(raw.stated))
    shapes = {name: ref.shape for name, ref in raw.tensors.items()}
    refuse_others(path, shapes)
    stated = raw.stated
    configs = {
        "unet": unet_config(shapes, stated.unet),
        "vae": vae_config(shapes, stated.vae),
        "text": text_config(shapes, stated.text),
    }
    variant = find_variant(shapes, stated.variant)
    said = {"depth": stated.depth, "image_encoder": stated.image_encoder}
    configs |= companion_configs(shapes, said, variant)
    found = with_statistics(path, raw.tensors, variant, embedding_stats)
    layers = configs["text"]["layers_used"]
    tensors = select(found, expected_shapes(configs), variant, layers)
    schedule = schedule_facts(stated, variant, raw.tensors)
    kind, decided_by = decide_prediction(prediction, stated, variant, tensors, configs["unet"])
    _log.info("%s: %s, prediction %s, decided by %s", path, variant, kind, decided_by)
    sha256 = _content(path, raw, progress)
    if embedding_stats is not None:
        sha256 = _with(sha256, {"embedding_stats": embedding_stats})
    source = SourceFacts(_printable(path.resolve().name), sha256, raw.kind, raw.weights)
    facts = model_facts(
        name=_printable(path.resolve().name if path.is_dir() else path.stem),
        variant=variant,
        prediction=kind,
        schedule=schedule,
        stated=stated,
        configs=configs,
        tensors=found,
        licence=raw.licence,
        source=replace(source, **raw.source),
    )
    return Checkpoint(path, raw.kind, sha256, facts, configs, tensors, {"prediction": decided_by})


def fingerprint(
    path: Path,
    *,
    config: Path | None = None,
    embedding_stats: Path | None = None,
    progress: Progress | None = None,
) -> str:
    """A hash of all that decides what `open_checkpoint` gives: the key of a cached export.

    It is the content's hash alone where no config is beside the model, and nothing is given.
    raises      as `open_checkpoint` where the model cannot be found
    """
    given = {"config": config, "embedding_stats": embedding_stats}
    configs = {name: file for name, file in given.items() if file is not None}
    if path.is_dir():
        content = digests.of_files(path, _find(path, True).files, progress)
    else:
        file_kind(path)  # refuses what is no model before hashing it
        content = digests.of_file(path, progress)
        if (beside := digests.sidecar(path)) is not None:
            configs["sidecar"] = beside
    return _with(content, configs)


def _with(content: str, files: Mapping[str, Path]) -> str:
    if not files:
        return content
    hashed = {name: digests.of_file(file) for name, file in files.items()}
    return digests.of_digests({"content": content, **hashed})


def _find(path: Path, ema: bool) -> _Raw:
    if not path.is_dir():
        return _file(path, ema)
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if (path / INDEX).is_file():
        folder = open_diffusers(path, ema=ema)
        licence = folder.metadata.get("licence")
        return _Raw("diffusers", folder.tensors, "plain", folder.stated, folder.files, licence, {})
    raise NotACheckpoint(
        f"{path} is a folder with neither {INDEX} (diffusers) nor {MANIFEST} (a bundle)",
        hint=_what_lies_in(path),
    )


def _file(path: Path, ema: bool) -> _Raw:
    container = open_container(path)
    beside = digests.sidecar(path)
    tensors, weights = _averaged(container.tensors, ema)
    return _Raw(
        kind=container.kind,
        tensors=tensors,
        weights=weights,
        stated=Stated() if beside is None else read_config(beside),
        files=(path,),
        licence=container.metadata.get("modelspec.license"),
        source={},
    )


def _bundle(path: Path) -> _Raw:
    folder, model = open_bundle_folder(path)
    # What was exported once keeps its origin when it is exported again.
    known = model.get("source")
    source = known if isinstance(known, dict) and _sound(known) else {}
    return _Raw("bundle", folder.tensors, "plain", folder.stated, folder.files, None, source)


def _sound(source: Mapping[str, Any]) -> bool:
    names = {f.name for f in fields(SourceFacts)}
    return set(source) == names and all(isinstance(v, str) for v in source.values())


def _averaged(tensors: Mapping[str, TensorRef], ema: bool) -> tuple[dict[str, TensorRef], Weights]:
    """The averaged weights in place of the trained ones, where there is a whole copy of them."""
    if not ema or sum(name.startswith(_EMA) for name in tensors) <= _EMA_REAL:
        return dict(tensors), "plain"
    result = {}
    for name, ref in tensors.items():
        if name.startswith("model."):
            # The copy's names are the parameters' with every dot removed.
            copy = _EMA + name.removeprefix("model.").replace(".", "")
            if copy in tensors:
                result[name] = tensors[copy].named(name)
        elif not name.startswith(_EMA):
            result[name] = ref
    return result, "ema"


def _printable(name: str) -> str:
    """A file name that is not UTF-8 on disk has no place in a manifest."""
    return name.encode("utf-8", "replace").decode()


def _content(path: Path, raw: _Raw, progress: Progress | None) -> str:
    if raw.files == (path,):
        return digests.of_file(path, progress)
    return digests.of_files(path, raw.files, progress)


def _what_lies_in(path: Path) -> str:
    try:
        inside = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise cannot_read(path, error) from error
    models = [n for n in inside if n.endswith((".safetensors", ".ckpt", ".pt"))]
    if models:
        return f"give the file itself: {', '.join(models[:3])}"
    return f"{EXPECTED}; the folder holds {', '.join(inside[:5]) if inside else 'nothing'}"
