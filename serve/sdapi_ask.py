"""From AUTOMATIC1111's words to a request, and back to the `info` of its answers.

checked by  tests/http/test_sdapi_words.py, tests/http/test_webuiapi.py
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

from .. import __version__
from ..engine import solvers
from ..engine.errors import RequestError, UnknownName
from ..engine.request import SEED_END, Request
from ..engine.schedule import SCHEDULES
from . import infotext
from .asks import Ask, Fill, Made, Pictures, Region
from .encode import decoded, metadata
from .models import Model
from .sdapi_fields import Img2Img, Making, check_inert

# Its label -> our schedule. Ours go by their own names too.
SCHEDULERS: Mapping[str, str] = {
    "Uniform": "linspace",
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "Align Your Steps": "align_your_steps",
    "Simple": "simple",
    "Normal": "linspace",
    "DDIM": "leading",
    "Beta": "beta",
}
OWN = "sdengine "  # before a name of ours: what it calls Uniform is not what we do
AUTOMATIC = "automatic"
# What it runs a sampler on where none is named and ours differs.
THEIR_SCHEDULES = {"dpmpp_2m": "karras"}
RESIZES = ("stretch", "fill", "fit")
NOISES = {"CPU": "torch", "NV": "philox"}
DEFAULTS: Mapping[str, Any] = {"steps": 50, "cfg_scale": 7.0, "denoising_strength": 0.75}
BLUR = 4  # pixels of a mask's edge


@dataclass
class Options:
    """What POST options may set. They are this server's, for its sdapi clients alone."""

    sd_model_checkpoint: str
    samples_format: str = "png"
    jpeg_quality: int = 95
    randn_source: str = "CPU"
    CLIP_stop_at_last_layers: int = 1
    live_previews_enable: bool = True

    _KINDS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "samples_format": ("png", "jpg", "jpeg", "webp"),
        "randn_source": tuple(NOISES),
        "CLIP_stop_at_last_layers": (1, 2),
        "live_previews_enable": (True, False),
        "jpeg_quality": tuple(range(1, 101)),
    }

    def changed(self, values: Mapping[str, Any]) -> Options:
        """Raises UnknownName, RequestError. The model's name is not checked here."""
        known = [*self._KINDS, "sd_model_checkpoint"]
        for name, value in values.items():
            if name not in known:
                raise UnknownName("option", name[:80], known)
            if name == "sd_model_checkpoint":
                if not isinstance(value, str):
                    raise RequestError(
                        f"{name} is no name: {str(value)[:60]}", hint="GET /sdapi/v1/sd-models"
                    )
            elif not any(value == one and type(value) is type(one) for one in self._KINDS[name]):
                raise RequestError(
                    f"option {name} is {str(value)[:60]!r}",
                    hint=f"give one of: {', '.join(map(str, self._KINDS[name][:6]))}",
                )
        return Options(**{**self.to_dict(), **values})

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sd_model_checkpoint", *self._KINDS)}


@dataclass(frozen=True)
class Meant:
    """What a body asks for. `ignored` are fields that nobody knows."""

    ask: Ask
    options: Options
    body: Making
    ignored: list[str] = field(default_factory=list)


def meant(body: Making, options: Options, model: Model) -> Meant:
    """`model` is the one that `options`, the body's own included, name. Raises RequestError."""
    ignored = check_inert(body)
    told = infotext.asked(body.infotext) if body.infotext else {}
    said = body.model_dump(exclude_unset=True)
    body = body.model_copy(update={k: v for k, v in told.items() if k not in said})
    asked, pictures = _request(body, options), Pictures()
    if isinstance(body, Img2Img):
        asked, pictures = _from_picture(body, asked)
    ask = Ask(model.name, Request.from_dict(asked), pictures, "sdapi")
    return Meant(ask.seeded(), options, body, ignored)


def _request(body: Making, options: Options) -> dict[str, Any]:
    count, times = _given(body.batch_size, 1), _given(body.n_iter, 1)
    if min(count, times) < 1:
        raise RequestError(f"{times} times {count} pictures", hint="batch_size and n_iter from 1")
    name = body.sampler_name if body.sampler_name else body.sampler_index
    sampler, schedule = solvers.resolve(name if name else "Euler")
    solver = solvers.find(sampler)
    asked: dict[str, Any] = {
        "prompt": body.prompt,
        "negative_prompt": _given(body.negative_prompt, ""),
        "sampler": sampler,
        "schedule": _schedule(body.scheduler, sampler, schedule),
        "steps": _given(body.steps, DEFAULTS["steps"]),
        "guidance": _given(body.cfg_scale, DEFAULTS["cfg_scale"]),
        "width": body.width,
        "height": body.height,
        "count": count * times,
        "batch_size": count,
        "prompt_weights": True,
        "long_prompt": True,
        "noise": NOISES[options.randn_source],
        "seed": None if body.seed in (None, -1) else body.seed,
    }
    if solver.eta:
        asked["eta"] = body.eta
    if (solver.eta or solver.noisy) and body.s_noise is not None:
        asked["s_noise"] = body.s_noise
    if body.subseed_strength:
        subseed = _given(body.subseed, -1)
        asked["variation_strength"] = body.subseed_strength
        asked["variation_seed"] = _drawn(count * times) if subseed == -1 else subseed
    return asked


def _drawn(count: int) -> int:
    return secrets.randbelow(max(1, SEED_END - count))  # a count beyond is refused later


def _schedule(label: str | None, sampler: str, named: str | None) -> str | None:
    if not label or label.lower() == AUTOMATIC:
        own = None if named is not None else THEIR_SCHEDULES.get(sampler)
        return named if named is not None else own
    known = {title.lower(): ours for title, ours in SCHEDULERS.items()}
    known |= {title.replace(" ", "_"): ours for title, ours in known.items()}
    own = label.lower().removeprefix(OWN)
    found = known.get(label.lower(), own if own in SCHEDULES else None)
    if found is None:
        raise UnknownName("scheduler", label[:80], ["Automatic", *SCHEDULERS, *SCHEDULES])
    return found


def _from_picture(body: Img2Img, asked: dict[str, Any]) -> tuple[dict[str, Any], Pictures]:
    if not body.init_images:
        raise RequestError("img2img without init_images", hint="send one picture in base64")
    images = tuple(decoded(text, "init_images") for text in body.init_images)
    mode = _given(body.resize_mode, 0)
    if mode not in range(len(RESIZES)):
        raise RequestError(
            f"resize_mode {mode} is not done here",
            hint="0 stretches, 1 crops, 2 fills in; for latent upscaling run at the larger size",
        )
    asked["resize"] = RESIZES[mode]
    asked["strength"] = _given(body.denoising_strength, DEFAULTS["denoising_strength"])
    if not body.mask:
        return asked, Pictures(images)
    fill = _given(body.inpainting_fill, 0)
    if fill not in (0, 1):
        raise RequestError(
            f"inpainting_fill {fill} is not done here",
            hint="0 fills with the colours around, 1 begins from the picture itself",
        )
    invert = bool(_given(body.inpainting_mask_invert, 0))
    blur = _given(body.mask_blur, BLUR)
    region = None
    if _given(body.inpaint_full_res, True):
        region = Region(_given(body.inpaint_full_res_padding, 0), blur)
    asked["mask_blur"], asked["invert_mask"] = float(blur), invert
    how: Fill = "around" if fill == 0 else "none"
    mask = decoded(body.mask, "mask")
    return asked, Pictures(images, mask, fill=how, region=region)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def info(meant: Meant, model: Model, made: list[Made], warnings: list[str], when: float) -> str:
    """The JSON text in `info`: the names that its own answers have, and our warnings."""
    ask, request = meant.ask, meant.ask.request
    seeds = [one.request.seed for one in made]
    varied = [_given(one.request.variation_seed, one.request.seed) for one in made]
    first = made[0].request if made else request
    ignored = [f"ignored: {name[:80]}" for name in meant.ignored]
    return json.dumps(
        {
            "prompt": request.prompt,
            "all_prompts": [request.prompt] * len(made),
            "negative_prompt": request.negative_prompt,
            "all_negative_prompts": [request.negative_prompt] * len(made),
            "seed": seeds[0] if seeds else request.seed,
            "all_seeds": seeds,
            "subseed": varied[0] if varied else -1,
            "all_subseeds": varied,
            "subseed_strength": request.variation_strength,
            "width": made[0].width if made else request.width,
            "height": made[0].height if made else request.height,
            "sampler_name": solvers.find(str(request.sampler)).title,
            "cfg_scale": request.guidance,
            "steps": request.steps,
            "batch_size": request.batch_size,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": model.name,
            "sd_model_hash": model.hash,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": request.strength,
            "extra_generation_params": {"Schedule type": first.schedule},
            "index_of_first_image": 0,
            "infotexts": [metadata(one).parameters for one in made],
            "styles": [],
            "job_timestamp": datetime.fromtimestamp(when).strftime("%Y%m%d%H%M%S"),
            "clip_skip": 1,
            "is_using_inpainting_conditioning": ask.pictures.mask is not None,
            "version": f"sdengine {__version__}",
            "warnings": [*warnings, *ignored],
        }
    )
