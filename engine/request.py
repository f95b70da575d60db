"""What is asked for, and what comes back. Every default of a run is a field's default here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import noise, presets, schedule, solvers
from .errors import RequestError, UnknownName
from .guidance import Halves
from .images import Pixels
from .inputs import RESIZES

SEED_END = 2**32
LONGEST_WORD = 64  # characters of a name, a colour, a number
MIN_SIDE, MAX_SIDE = 16, 4096


# What a run does where its request leaves it open. The numbers are the field's (reference-spec
# 3.12), with the sampler and the steps that this engine runs by default; `reference` has those of
# the reference's own scripts, under --compat reference.
_OURS: Mapping[str, Any] = {"steps": 25, "guidance": 7.5, "sampler": "dpmpp_2m"}
_REFERENCE: Mapping[str, Any] = {
    "steps": 50, "guidance": 9.0, "sampler": "ddim", "schedule": "reference",
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "txt2img": _OURS,
    "img2img": {**_OURS, "strength": 0.8},
    "inpaint": {**_OURS, "strength": 1.0},
    "depth2img": {**_OURS, "strength": 0.8},
    "upscale": {**_OURS, "guidance": 9.0, "noise_level": 20},
    "unclip": {**_OURS, "guidance": 10.0, "noise_level": 0},
}
REFERENCE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "txt2img": _REFERENCE,
    "img2img": {**_REFERENCE, "strength": 0.8},
    "inpaint": {**_REFERENCE, "guidance": 10.0, "strength": 1.0, "noise": "numpy"},
    "depth2img": {**_REFERENCE, "strength": 0.9},
    "upscale": {**_REFERENCE, "steps": 75, "guidance": 10.0, "noise_level": 20, "noise": "numpy"},
    "unclip": {**_REFERENCE, "steps": 20, "guidance": 10.0, "noise_level": 0},
}


@dataclass(frozen=True)
class Request:
    """One run: `count` pictures of one prompt. What is None takes the task's default (DEFAULTS).

    prompt, negative_prompt   text; empty is legal
    task            a name of engine.tasks.TASKS; None: what model and pictures call for
    width, height   pixels, 16..4096; None takes the model's native size, or the given picture's
    steps           1..1000
    guidance        scale of classifier-free guidance; 1 turns it off, 0 ignores the prompt
    sampler         a name of engine.solvers.SOLVERS, or another tool's: `DPM++ 2M Karras`
    schedule        a name of engine.schedule.SCHEDULES; None takes the sampler's own
    sigmas, timesteps   an explicit schedule, largest first, in place of the named one
    zero_snr        start at (almost) no picture: for v models trained that way
    eta             0..1, for samplers that take one: 0 deterministic, 1 ancestral; None: its own
    s_noise         what the noise of a sampler that draws some is multiplied by
    preset          a name of engine.presets.PRESETS; what is given beside it goes before it
    cache           every how many steps the network runs whole, not from cached features; 1: always
    cut             the skip at which the shallow network is cut; 0 is the cheapest
    guidance_scales     one for each network call, in place of `guidance`
    cfg_plus_plus   0..1, the share of CFG++ in place of `guidance`; for samplers of first order
    solver          a sampler in a JSON file (docs/samplers.md), in place of sampler and schedule
    guidance_interval   (low, high): guidance only where sigma / alpha lies between
    rescale         0..1, phi of guidance rescale, against overexposure
    halves          `together`: both halves of guidance in one call; `apart`: in two
    prompt_weights  read (word:1.3) and [word]; else they are plain text
    long_prompt     prompts beyond 75 tokens in chunks; else the rest is cut off
    variation_seed, variation_strength   turn the start noise towards another seed's, 0..1
    seed            0..2^32-1 of the first picture, the next ones count up; None draws one
    count           pictures, 1..10000
    batch_size      pictures in one network call, 1..64
    strength        0..1, how much of the schedule runs on a given picture; 1: all of it
    noise_level     noise added to the upscaler's picture (0..350) or to an embedding (0..999)
    weights         of the pictures to mix, one each
    resize          how a picture comes to an asked size: a name of RESIZES
    background      what lies under a transparent picture, a colour
    invert_mask     black is repainted, not white
    mask_blur       0..256, radius in pixels of the seam where the unmasked part is pasted back
    thin_mask       `nearest` as the reference: strokes under a latent cell may vanish; `max` keeps
    paste           put the unmasked part of the picture itself back
    noise           a name of engine.noise.KINDS
    compat          `reference`: its defaults, its spacing, its noise level of img2img
    watermark       the invisible mark, where the picture is large enough
    safety          what is done with a picture that the bundle's classifier objects to
    tile            side of a tile in latent cells, `auto` or `off`

    raises          RequestError, UnknownName
    """

    prompt: str = ""
    negative_prompt: str = ""
    task: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    zero_snr: bool = False
    eta: float | None = None
    s_noise: float = 1.0
    preset: str | None = None
    cache: int | None = None
    cut: int | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_scales: tuple[float, ...] | None = None
    cfg_plus_plus: float | None = None
    solver: str | None = None
    rescale: float | None = None
    halves: Halves = "together"
    prompt_weights: bool = False
    long_prompt: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0
    seed: int | None = None
    count: int = 1
    batch_size: int = 1
    strength: float | None = None
    noise_level: int | None = None
    weights: tuple[float, ...] | None = None
    resize: str = "stretch"
    background: str = "white"
    invert_mask: bool = False
    mask_blur: float = 0.0
    thin_mask: str = "nearest"
    paste: bool = True
    noise: str | None = None
    compat: str | None = None
    watermark: bool = True
    safety: str = "off"
    tile: int | str = "auto"

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "background"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(
                    f"{name} is {type(getattr(self, name)).__name__}, not text",
                    hint=f"give {name} as a str; bytes must be decoded first",
                )
        self._check_words()
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"{name} is {_shown(getattr(self, name))}, not true or false",
                    hint=f"give {name} as True or False",
                )
        for name, low, high in _WHOLE:
            _check_whole(name, getattr(self, name), low, high)
        for name, least, most in _REAL:
            _check_real(name, getattr(self, name), least, most)
        self._resolve_sampler()
        for name, known in NAMES_OF.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UnknownName(name.replace("_", "-"), value, known)
        for name in _LISTS:
            self._check_list(name)
        for name in ("seed", "variation_seed"):
            first = getattr(self, name)
            if first is not None and first + self.count > SEED_END:
                raise RequestError(
                    f"{name} {first} and {self.count} pictures reach past {SEED_END - 1}",
                    hint=f"take at most {SEED_END - self.count}, or fewer pictures",
                )
        if self.sampler is not None and self.eta and not solvers.find(self.sampler).eta:
            solvers.refuse_eta(self.sampler, self.eta)
        if self.sigmas is not None and self.timesteps is not None:
            raise RequestError(
                "both sigmas and timesteps are given", hint="give one of the two schedules"
            )
        if self.variation_strength and self.variation_seed is None:
            raise RequestError(
                "a variation strength without a variation seed",
                hint="give --variation-seed, the seed to turn towards",
            )

    def _check_words(self) -> None:
        """What is compared, looked up or sent on later: of a plain type, and short."""
        for name in NAMES_OF:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(
                    f"{name} is {_shown(value)}, not a name",
                    hint=f"give {name} as one of: {', '.join(NAMES_OF[name])}",
                )
        if len(self.background) > LONGEST_WORD:
            raise RequestError(
                f"background has {len(self.background)} characters, more than any colour",
                hint="give a colour name such as white or grey, or #rrggbb",
            )
        plain = isinstance(self.tile, (int, str)) and not isinstance(self.tile, bool)
        if not plain or len(_shown(self.tile)) > LONGEST_WORD:
            raise RequestError(
                f"tile is {_shown(self.tile)}, no side of a tile",
                hint="give auto, off, or a number of latent cells such as 64",
            )

    def _resolve_sampler(self) -> None:
        """Another tool's name of a sampler becomes ours, with the schedule that it means."""
        if self.sampler is None:
            return
        sampler, spacing = solvers.resolve(self.sampler)
        object.__setattr__(self, "sampler", sampler)
        if self.schedule is None and self.sigmas is None and self.timesteps is None:
            object.__setattr__(self, "schedule", spacing)

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if not isinstance(values, (tuple, list)):
            raise RequestError(
                f"{name} is {_shown(values)}, not a list", hint=f"give {name} as a list of numbers"
            )
        object.__setattr__(self, name, tuple(values))  # JSON has lists alone
        low, high, count = _LISTS[name]
        if count is not None and len(values) != count:
            raise RequestError(
                f"{name} has {len(values)} numbers, not {count}",
                hint=f"give {name} {count} numbers",
            )
        for value in values:
            _check_real(name, value, low, high)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """From a picture's metadata or a JSON line; an unknown key is an error."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise UnknownName("request field", name, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field; their values cannot be changed, so none is copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def defaults(self, task: str) -> Mapping[str, Any]:
        """What this request's None's become for a task. Not every task has every field.

        A preset goes before the task's own.
        """
        own = (REFERENCE_DEFAULTS if self.compat == "reference" else DEFAULTS)[task]
        columns = {"cache": 1, "cut": presets.CUT, "guidance_interval": None, "rescale": 0.0}
        chosen = {} if self.preset is None else presets.PRESETS[self.preset].fields()
        return {**columns, **own, **{k: v for k, v in chosen.items() if v is not None}}

    def completed(self, task: str, native_size: tuple[int, int] | None) -> Request:
        """Nothing left open: the task's defaults, the sampler's schedule and eta, a drawn seed.

        native_size     (height, width); None for a task whose picture brings its own
        raises          RequestError for a field that the task has no use for
        """
        defaults = self.defaults(task)
        for name, what in _ONLY_SOME.items():
            if getattr(self, name) is not None and name not in defaults:
                raise RequestError(
                    f"{task} takes no {what}",
                    hint=f"leave {name} out; it is for "
                    + ", ".join(t for t, d in DEFAULTS.items() if name in d),
                )
        fill = {n: v for n, v in defaults.items() if getattr(self, n) is None}
        if self.sampler is not None and self.schedule is None:
            fill.pop("schedule", None)  # the reference's spacing belongs to its own sampler
        whole = replace(self, task=task, **fill)
        if native_size is not None:
            height, width = native_size
            whole = replace(
                whole,
                width=width if self.width is None else self.width,
                height=height if self.height is None else self.height,
            )
        assert whole.sampler is not None
        return replace(
            whole,
            schedule=self._schedule_of(whole),
            steps=self._steps_of(whole),
            eta=self._eta_of(whole),
            noise="torch" if whole.noise is None else whole.noise,
            seed=secrets.randbelow(SEED_END - self.count) if self.seed is None else self.seed,
        )

    @staticmethod
    def _schedule_of(whole: Request) -> str | None:
        if whole.sigmas is not None or whole.timesteps is not None:
            return None
        assert whole.sampler is not None
        return solvers.find(whole.sampler).schedule if whole.schedule is None else whole.schedule

    @staticmethod
    def _eta_of(whole: Request) -> float | None:
        """The sampler's own, where it takes one and none is asked for."""
        assert whole.sampler is not None
        solver = solvers.find(whole.sampler)
        return solver.default_eta if solver.eta and whole.eta is None else whole.eta

    @staticmethod
    def _steps_of(whole: Request) -> int | None:
        """An explicit schedule says itself how many there are."""
        if whole.sigmas is not None:
            return len(whole.sigmas) - 1
        return whole.steps if whole.timesteps is None else len(whole.timesteps)

    def own(self, index: int) -> Request:
        """What makes picture number `index` of a completed request alone.

        Seeds count up; with a variation the first seed stays, and the variation's counts up.
        """
        assert self.seed is not None
        if self.variation_seed is None:
            return replace(self, seed=self.seed + index, count=1, batch_size=1)
        varied = self.variation_seed + index
        return replace(self, variation_seed=varied, count=1, batch_size=1)


SAFETY = ("off", "mark", "block")
_FLAGS = ("invert_mask", "paste", "watermark", "zero_snr", "prompt_weights", "long_prompt")
_ONLY_SOME = {"strength": "strength", "noise_level": "noise level"}
# name -> least, most, how many
_LISTS: Mapping[str, tuple[float, float, int | None]] = {
    "weights": (-100.0, 100.0, None),
    "sigmas": (0.0, 1e6, None),
    "timesteps": (0.0, 1e6, None),
    "guidance_interval": (0.0, 1e6, 2),
    "guidance_scales": (-100.0, 100.0, None),
}
_WHOLE = (
    ("width", MIN_SIDE, MAX_SIDE),
    ("height", MIN_SIDE, MAX_SIDE),
    ("steps", 1, 1000),
    ("seed", 0, SEED_END - 1),
    ("count", 1, 10_000),
    ("batch_size", 1, 64),
    ("noise_level", 0, 999),
    ("cache", 1, 1000),
    ("cut", 0, 11),
    ("variation_seed", 0, SEED_END - 1),
)
_REAL = (
    ("guidance", -100.0, 100.0),
    ("eta", 0.0, 1.0),
    ("strength", 0.0, 1.0),
    ("mask_blur", 0.0, 256.0),
    ("s_noise", 0.0, 2.0),
    ("rescale", 0.0, 1.0),
    ("cfg_plus_plus", 0.0, 1.0),
    ("variation_strength", 0.0, 1.0),
)
# field -> the names that it may have
NAMES_OF: Mapping[str, Collection[str]] = {
    "task": DEFAULTS,
    "sampler": solvers.SOLVERS,
    "schedule": schedule.SCHEDULES,
    "resize": RESIZES,
    "thin_mask": ("nearest", "max"),
    "noise": noise.KINDS,
    "compat": ("reference",),
    "safety": SAFETY,
    "preset": presets.PRESETS,
    "halves": ("together", "apart"),
}


def _shown(value: Any) -> str:
    """For a message: of what may be deep, long or huge its type alone, or its beginning."""
    if isinstance(value, int) and abs(value) > 2**64:
        return "a number of more than 64 bits"
    if isinstance(value, (str, int, float)):
        text = repr(value[: LONGEST_WORD + 1] if isinstance(value, str) else value)
        return text if len(text) <= LONGEST_WORD + 2 else f"{text[:LONGEST_WORD]}..."
    return type(value).__name__


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None and name not in ("count", "batch_size"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            f"{name} is {_shown(value)}, not a whole number", hint=f"give {name} as {low} to {high}"
        )
    if not low <= value <= high:
        raise RequestError(
            f"{name} is {_shown(value)}; it must lie in {low} to {high}",
            hint=f"give {name} a value in that range",
        )


def _check_real(name: str, value: Any, low: float, high: float) -> None:
    if value is None and name not in ("mask_blur", "s_noise", "variation_strength"):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN and infinity lie nowhere
        raise RequestError(
            f"{name} is {_shown(value)}; it must be a number from {low:g} to {high:g}",
            hint=f"give {name} a value in that range",
        )


@dataclass(frozen=True)
class Progress:
    """Where a run is: handed to `on_step` after each network call.

    guess       makes a rough picture, uint8 [H, W, 3], of what the network takes a picture of the
                batch for (the first, or that of the number given); None where the model has none
    """

    picture: int
    pictures: int
    step: int
    steps: int
    seconds: float
    guess: Callable[..., Pixels] | None = None


@dataclass
class Timings:
    """Seconds of one run. `engine` is spent inside sessions, `load` opening them.

    prepare     given pictures, masks, depth, embeddings: read and encoded
    """

    load: float = 0.0
    text: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    engine: float = 0.0
    rows: list[float] = field(default_factory=list)

    @property
    def own(self) -> float:
        """Seconds outside sessions: what the runtime itself costs."""
        return self.total - self.engine - self.load
