"""Models that are folders: a diffusers folder, and our own bundle read as a checkpoint.

checked by  tests/unit/checkpoint/test_diffusers.py, tests/unit/checkpoint/test_bundle.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..engine.errors import NotACheckpoint
from ..engine.safety import COMPONENT as CLASSIFIER
from . import names
from .companions import from_normalizer
from .containers import TensorRef, cannot_read, open_container
from .stated import Params, Reader, Stated, diffusers_config, manifest_config
from .variants import EXPECTED

INDEX = "model_index.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Folder:
    """tensors under LDM names, what its configs state, and the files that were used"""

    tensors: Mapping[str, TensorRef]
    stated: Stated
    files: tuple[Path, ...]
    metadata: Mapping[str, str]


# -- diffusers ---------------------------------------------------------------------------------

_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionUpscalePipeline",
    "StableUnCLIPPipeline",
    "StableUnCLIPImg2ImgPipeline",
)
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_MAPPERS = {"unet": names.from_unet, "vae": names.from_vae, "text_encoder": names.from_text}
# component -> stem of its weights and what names them, for those that only some models have
_COMPANIONS = {
    "depth_estimator": ("model", names.from_depth),
    "image_encoder": ("model", names.from_image),
    "image_normalizer": ("diffusion_pytorch_model", from_normalizer),
}
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
_COMPANION_CONFIGS = {
    "depth_estimator": "config.json",
    "image_encoder": "config.json",
    "low_res_scheduler": "scheduler_config.json",
    "image_noising_scheduler": "scheduler_config.json",
}


def open_diffusers(path: Path, *, ema: bool) -> Folder:
    """A folder with `model_index.json`.

    ema         False takes the weights before averaging, where they lie beside (`.non_ema.`)
    raises      NotACheckpoint, UnsafeCheckpoint, BadConfig, StorageError
    """
    index = read_json(path / INDEX)
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise NotACheckpoint(
            f"{path} is a diffusers folder for {pipeline}; {EXPECTED}",
            hint=f"known pipelines: {', '.join(_PIPELINES)}",
        )
    tensors: dict[str, TensorRef] = {}
    files = [path / INDEX]
    for component, stem in _STEMS.items():
        found, used = _component(path / component, stem, ema)
        tensors |= _MAPPERS[component](found)
        files += used
    for component, (stem, mapper) in _COMPANIONS.items():
        if (path / component).is_dir():
            found, used = _component(path / component, stem, ema)
            tensors |= mapper(found)
            files += used
    beside = {c: path / c / name for c, name in _COMPANION_CONFIGS.items()}
    configs = {c: path / c / name for c, name in _CONFIGS.items()}
    configs |= {c: file for c, file in beside.items() if file.is_file()}
    files += [p for p in configs.values() if p.is_file()]
    # Without a tokenizer the pad id stays unsaid; all the other configs are needed.
    parts = {
        c: {} if c == "tokenizer" and not p.is_file() else read_json(p) for c, p in configs.items()
    }
    parts["index"] = index
    _refuse_sd1(path, parts)
    vocabulary = path / "tokenizer" / "vocab.json"
    known = None
    if vocabulary.is_file():
        known = read_json(vocabulary)
        files.append(vocabulary)
    stated = diffusers_config(str(path), parts, known)
    return Folder(tensors, stated, tuple(files), _card(path))


def _component(folder: Path, stem: str, ema: bool) -> tuple[dict[str, TensorRef], list[Path]]:
    """One network's tensors, under diffusers names, and the weight files."""
    if not folder.is_dir():
        raise NotACheckpoint(
            f"{folder.parent} has no folder {folder.name}",
            hint="a diffusers folder holds unet, vae, text_encoder, tokenizer and scheduler",
        )
    candidates = list(_candidates(stem, ema))
    name = next((c for c in candidates if (folder / c).is_file()), None)
    if name is None:
        raise NotACheckpoint(
            f"{folder} has no weights; looked for {', '.join(candidates[:4])} and the like",
            hint="the download is incomplete; if it came by git, run `git lfs pull`",
        )
    if not name.endswith(".json"):
        return dict(open_container(folder / name).tensors), [folder / name]
    return _sharded(folder, name)


def _candidates(stem: str, ema: bool) -> Iterable[str]:
    """File names in order of preference: safetensors before bin, full precision before half."""
    torch_stem = "pytorch_model" if stem == "model" else stem
    variants = ("", ".fp16") if ema else (".non_ema", "", ".fp16")
    for base, end in ((stem, "safetensors"), (torch_stem, "bin")):
        for variant in variants:
            yield f"{base}{variant}.{end}"
            yield f"{base}{variant}.{end}.index.json"
            if variant:  # the spelling of diffusers before 0.31
                yield f"{base}.{end}.index{variant}.json"


def _sharded(folder: Path, index: str) -> tuple[dict[str, TensorRef], list[Path]]:
    where = read_json(folder / index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise NotACheckpoint(
            f"{folder / index} has no weight_map", hint="fetch the folder again; it is damaged"
        )
    unsafe = [f for f in where.values() if not isinstance(f, str) or PurePosixPath(f).name != f]
    if unsafe:
        raise NotACheckpoint(
            f"{folder / index} names {unsafe[0]!r}, which is not a file of its own folder",
            hint="do not use this folder unless you know who made it",
        )
    files = sorted({folder / name for name in where.values()})
    shards = {file.name: open_container(file).tensors for file in files}
    absent = [name for name, file in where.items() if name not in shards[file]]
    if absent:
        raise NotACheckpoint(
            f"{folder / where[absent[0]]} lacks {absent[0]!r} and {len(absent) - 1} more that "
            f"{index} promises",
            hint="the files do not belong together; fetch the folder again",
        )
    return {name: shards[file][name] for name, file in where.items()}, [folder / index, *files]


def _refuse_sd1(path: Path, parts: Mapping[str, Params]) -> None:
    """Stable Diffusion 1 has the same pipeline class, another text tower and 768 wide context."""
    if parts["unet"].get("cross_attention_dim") == 768:
        raise NotACheckpoint(
            f"{path} looks like Stable Diffusion 1.x (cross_attention_dim 768); {EXPECTED}",
            hint="sdengine takes whole Stable Diffusion 2.0 and 2.1 models",
        )


def _card(path: Path) -> dict[str, str]:
    """The licence of the model card's front matter, where there is one."""
    try:
        lines = (path / "README.md").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines[1:60] if lines[:1] == ["---"] else []:
        if line.startswith("license:"):
            return {"licence": line.removeprefix("license:").strip()}
        if line == "---":
            break
    return {}


# -- bundle ------------------------------------------------------------------------------------


def open_bundle_folder(path: Path) -> tuple[Folder, Params]:
    """Our own bundle, its facts and its manifest's `model`.

    Graphs, targets and hashes are not looked at: this is how a bundle of an older format is
    written again.
    raises      NotACheckpoint, BadConfig, StorageError
    """
    manifest = read_json(path / MANIFEST)
    reader = Reader(str(path / MANIFEST))
    components = reader.part(manifest, "components")
    model = reader.part(manifest, "model")
    if not components or not model:
        raise NotACheckpoint(
            f"{path / MANIFEST} is not the manifest of a bundle: no `model` or no `components`",
            hint="give the folder that `sdengine export CHECKPOINT --out FOLDER` wrote",
        )
    tensors: dict[str, TensorRef] = {}
    files = []
    for name in components:
        if name == CLASSIFIER:
            continue  # it came from elsewhere, and is added to a bundle, not exported with it
        weights = reader.part(components, name).get("weights")
        if not isinstance(weights, str) or not _inside(weights):
            raise NotACheckpoint(
                f"{path / MANIFEST}: the weights of {name} are {weights!r}, "
                "which is no path inside the bundle",
                hint="do not use this bundle unless you know who wrote it",
            )
        if (file := path / weights) not in files:
            files.append(file)
            tensors |= open_container(file).tensors
    return Folder(tensors, manifest_config(reader, manifest), tuple(files), {}), model


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and ".." not in parts


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises NotACheckpoint, StorageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotACheckpoint(
            f"{path} is not there", hint="the folder is incomplete; fetch it again"
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise NotACheckpoint(
            f"{path} is not sound JSON: {error}", hint="fetch the folder again; it is damaged"
        ) from error
    if not isinstance(value, dict):
        raise NotACheckpoint(f"{path} is no JSON object", hint="fetch the folder again")
    return value
