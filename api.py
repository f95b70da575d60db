"""The composition root: the one runtime module that knows both the engine and the backends."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

from . import __version__, backends
from .backends import machine
from .backends.relay import Relay
from .engine.bundle import MANIFEST, Bundle, open_bundle
from .engine.errors import (
    BackendUnavailable,
    MissingPart,
    NotABundle,
    RequestError,
    SdengineError,
    UnknownName,
)
from .engine.footprint import Loading
from .engine.given import Given
from .engine.metadata import read_metadata
from .engine.paths import cache_dir
from .engine.pipeline import Pipeline
from .engine.ports import Backend, Denoiser, Probe, Session
from .engine.presets import PRESETS
from .engine.spec import PRECISIONS, Precision, Profile, bands_of

log = logging.getLogger("sdengine")

EMBEDDED = {"emoji": Path(__file__).parent / "models" / "emoji"}
DEFAULT = "emoji"  # what runs where no model is named
KEPT_SHAPES = 4  # compiled shapes of one network that stay loaded
KEPT_BANDS = 8  # of one in bands: the whole, and tiles at each of its resolutions

Progress = Callable[[str, float], None]


def load(
    model: str | Path = DEFAULT,
    *,
    backend: str = "auto",
    precision: Precision | None = None,
    threads: int | None = None,
    pin: bool | None = None,
    numa_node: str | None = None,
    cores: str | None = None,
    hyper_threads: bool | None = None,
    device: str | None = None,
    while_building: str | None = None,
    low_memory: bool = False,
    preset: str | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """A pipeline, ready for requests.

    model       an embedded model's name, a bundle folder, a checkpoint file or a diffusers folder;
                the latter two are exported once into the cache
    backend     a name of backends.NAMES, or "auto": the fastest that can run here
    precision   None takes the fastest that the backend has here and the bundle has proved
    threads     processor threads; None: what machine.plan says
    pin, numa_node, cores, hyper_threads   as machine.Wish has them. Where the plan leaves out
                processors, the calling thread and those it starts later stay on the others
    device      what OpenVINO runs on: CPU, GPU, GPU.1, NPU or AUTO; backends for NVIDIA's GPUs:
                cuda, cuda:1; None: the backend's own default
    while_building  a backend that serves, in float32, while the other one builds its engines
    low_memory  one network at a time is in memory, each loaded anew when its turn comes
    preset      a name of engine.presets.PRESETS, whose precision is taken when none is asked for
    progress    called with (what, fraction done) while a checkpoint is exported
    raises      BundleError, BackendError, CheckpointError, ExportError, RequestError
    """
    bundle = open_bundle(find_model(model, progress))
    chosen, probe, why = backends.choose(None if backend == "auto" else backend, device)
    if precision is None and preset is not None:
        precision = preset_precision(bundle, chosen.name, probe, preset)
    precision = choose_precision(bundle, chosen.name, probe, precision)
    log.info("backend %s, precision %s: %s", chosen.name, precision, why)
    meanwhile = {} if while_building is None else {"while_building": while_building}
    if while_building is not None:
        chosen = Relay(chosen, backends.choose(while_building).backend)
    plan = machine.plan(wish=machine.Wish(threads, pin, numa_node, cores, hyper_threads))
    machine.settle(plan)
    like = _profile(plan, device)
    sessions = EngineSessions(
        bundle, chosen, precision, plan.threads, like=like, low_memory=low_memory
    )
    about = {"version": __version__, "backend": chosen.name, "precision": precision, **meanwhile}
    if chosen.name in backends.GPU or device not in (None, "CPU"):
        return Pipeline(bundle, sessions, about)  # the machine's memory says nothing of theirs
    loading = Loading(precision, low_memory)
    return Pipeline(bundle, sessions, about, machine.available_memory(), loading)


@dataclass(frozen=True)
class Recorded:
    """What a picture says of its making.

    how         arguments of `load`
    request     fields of the Request
    pictures    image, mask, depth: keyword arguments of a pipeline
    """

    how: dict[str, Any]
    request: Mapping[str, Any]
    pictures: dict[str, Any]


def recorded(path: Path, instead: Mapping[str, Any] | None = None) -> Recorded:
    """How the picture at `path` was made, from its own metadata.

    instead     pictures to use in place of those that it was made from
    raises      RequestError when it does not say, or when a picture that it was made from is gone
    """
    found = read_metadata(path)
    if found.request is None:
        raise RequestError(
            f"{path} does not say how it was made",
            hint="pictures that sdengine saved do; a copy that went through another program or a "
            "web service may have lost it",
        )
    how = {name: found.about[name] for name in ("backend", "precision") if name in found.about}
    if found.about.get("model") in EMBEDDED:
        how["model"] = found.about["model"]
    new = {} if instead is None else dict(instead)
    old = {k: v for k, v in found.about.items() if k.split(" ")[0] not in new}
    given = Given.recorded(old)
    pictures = _given(image=list(given.images), mask=given.mask, depth=given.depth)
    return Recorded(how, found.request, pictures | new)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, [])}


def find_model(model: str | Path, progress: Progress | None = None) -> Path:
    """The folder of a bundle for what the user named. Raises NotABundle, UnknownName."""
    if str(model) in EMBEDDED:
        return EMBEDDED[str(model)]
    path = Path(model)
    if (path / MANIFEST).is_file():
        return path
    if path.is_file() or (path / "model_index.json").is_file():
        return export_once(path, progress)
    if path.exists():
        raise NotABundle(
            f"{path} is a folder without {MANIFEST} or model_index.json",
            hint="name a bundle (`sdengine export CHECKPOINT --out FOLDER` makes one),"
            " a diffusers folder, or a .safetensors or .ckpt file",
        )
    if len(path.parts) == 1 and not path.suffix:
        raise UnknownName("model", str(model), EMBEDDED)
    raise NotABundle(
        f"there is no {path}",
        hint=f"name a bundle, a checkpoint or one of: {', '.join(EMBEDDED)}",
    )


def export_once(checkpoint: Path, progress: Progress | None) -> Path:
    """The cached bundle of a checkpoint, exported now if its content was never seen before."""
    from .export import export_bundle  # torch: only where a checkpoint is turned into a bundle
    from .export.checkpoint import fingerprint, open_checkpoint

    home = cache_dir() / "bundles" / fingerprint(checkpoint)[:32]
    if not (home / MANIFEST).is_file():
        log.info("exporting %s once, into %s", checkpoint, home)
        home.parent.mkdir(parents=True, exist_ok=True)
        export_bundle(open_checkpoint(checkpoint), home, progress=progress)
    return home


def choose_precision(
    bundle: Bundle, backend: str, probe: Probe, asked: Precision | None
) -> Precision:
    """The asked precision if it can be had and was proved, else the fastest such; f32 always is.

    raises      RequestError, BackendUnavailable
    """
    proved = bundle.targets[backend].precisions if backend in bundle.targets else ()
    free = ("f32", *probe.trusted)
    usable = [p for p in probe.precisions if p in free or p in proved]
    if asked is None:  # 8 bits change the picture: they are asked for, by name or by preset
        return next(p for p in usable if p not in ("int8", "fp8"))
    if asked in usable:
        return asked
    if asked not in PRECISIONS:
        raise UnknownName("precision", asked, PRECISIONS)
    if asked not in probe.precisions:
        raise BackendUnavailable(
            f"{backend} cannot compute in {asked} on this machine",
            hint=f"use one of: {', '.join(usable)}",
        )
    raise RequestError(
        f"{bundle.path.name} was not proved in {asked} on {backend}; it has {', '.join(usable)}",
        hint=f"prove it: sdengine export {bundle.path} --target {backend} --precision {asked}",
    )


def _profile(plan: machine.Plan, device: str | None) -> Profile:
    """What all networks of a run have in common, beside precision and threads."""
    return Profile(
        pin=plan.pin,
        hyper_threads=plan.hyper_threads,
        fast_only=plan.fast_only,
        device=device,
    )


def preset_precision(bundle: Bundle, backend: str, probe: Probe, preset: str) -> Precision:
    """The precision that a preset asks for, or float32 where it cannot be had.

    int8 is a quantised model: where a preset names it, a bundle that has none is told so, and not
    run in another precision; where it takes it instead of its own, it is taken where it is.
    raises      UnknownName
    """
    if preset not in PRESETS:
        raise UnknownName("preset", preset, PRESETS)
    proved = bundle.targets[backend].precisions if backend in bundle.targets else ()
    if PRESETS[preset].or_int8 and "int8" in proved and "int8" in probe.precisions:
        return "int8"
    wanted = PRESETS[preset].precision
    possible = wanted == "int8" or (wanted in probe.precisions and wanted in (*proved, "f32"))
    return wanted if possible else "f32"


def preset_quality(path: Path) -> dict[str, Any] | None:
    """What each preset costs and loses on an embedded model: measured by bench/presets_quality.py,
    kept beside the bundle. None for a bundle that nobody measured."""
    file = path.with_name(f"{path.name}.presets.json")
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _let_go(ahead: Future[Session]) -> None:
    """Close what a finished load has brought."""
    if ahead.exception() is None:
        ahead.result().close()


class EngineSessions:
    """The networks of a bundle on one backend: compiled when first asked for, the last few kept.

    low_memory  a network is closed before another one is loaded
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        precision: Precision,
        threads: int | None,
        *,
        like: Profile | None = None,
        low_memory: bool = False,
    ) -> None:
        self._bundle, self._backend, self._low_memory = bundle, backend, low_memory
        like = Profile() if like is None else like
        self._profile = replace(like, precision=precision, threads=threads)
        self._open: OrderedDict[tuple[str, Profile], Session] = OrderedDict()
        self._ahead: dict[tuple[str, Profile], Future[Session]] = {}

    @property
    def denoiser(self) -> Denoiser | None:
        """That of the backend, where it has one."""
        return getattr(self._backend, "denoiser", None)

    def __call__(self, component: str, dims: Mapping[str, int], *, paired: bool = False) -> Session:
        key = self._key(component, dims, paired)
        if key not in self._open:
            ahead = self._ahead.pop(key, None)
            self._make_room(component)
            self._open[key] = self._load(key) if ahead is None else ahead.result()
        self._open.move_to_end(key)
        return self._open[key]

    def expect(
        self,
        component: str,
        dims: Mapping[str, int],
        graph: str = "full",
        *,
        paired: bool = False,
    ) -> None:
        """Begin to load a network that will be asked for, and this graph of it, beside what runs.

        What goes wrong is raised where the network is asked for. One that an earlier run expected
        and never asked for, as it failed, makes room for this one, unless it is the same.
        """
        key = self._key(component, dims, paired)
        if self._low_memory or key in self._open or key in self._ahead:
            return
        self._make_room(component)
        future: Future[Session] = Future()
        self._ahead[key] = future

        def work() -> None:
            try:
                future.set_result(self._load(key, graph))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name=f"sdengine-load-{component}", daemon=True).start()

    def _key(self, component: str, dims: Mapping[str, int], paired: bool) -> tuple[str, Profile]:
        if component not in self._bundle.components:
            raise MissingPart(
                f"{self._bundle.path.name} has no component {component!r}",
                hint=f"it has {', '.join(self._bundle.components)}; export the checkpoint again",
            )
        named = self._bundle.components[component].spec.dims
        dims = {name: size for name, size in dims.items() if name in named}
        return component, replace(self._profile, dims=dims, paired=paired)

    def _load(self, key: tuple[str, Profile], graph: str | None = None) -> Session:
        component, profile = key
        start = perf_counter()
        session = self._backend.load(self._bundle.components[component], profile)
        try:
            if graph is not None:
                session.graph(graph)
        except SdengineError:
            session.close()
            raise
        took = perf_counter() - start
        log.info("loaded %s for %s in %.1f s", component, profile.label(), took)
        return session

    def _make_room(self, component: str) -> None:
        if self._low_memory:
            for key in [key for key in self._open if key[0] != component]:
                self._open.pop(key).close()
        most = KEPT_BANDS if bands_of(self._bundle.components[component]) else KEPT_SHAPES
        held = [key for key in self._open if key[0] == component]
        if len(held) >= most:
            self._open.pop(held[0]).close()
        for key in [key for key in self._ahead if key[0] == component]:
            self._ahead.pop(key).add_done_callback(_let_go)

    def close(self) -> None:
        while self._ahead:
            _, ahead = self._ahead.popitem()
            ahead.exception()  # waits for it
            _let_go(ahead)
        while self._open:
            self._open.popitem()[1].close()
