"""The bodies that AUTOMATIC1111's clients send: its names, its defaults.

Fields that it has and this engine has not are listed with the values at which they change nothing;
any other value is refused, so that no client gets a picture without what it asked for. Fields that
are none of its own (extensions add some) are ignored, as it does, and named in `info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..engine.errors import RequestError

SIZES = Annotated[int, Field(ge=-1, le=2**20)]
PADDING = Annotated[int, Field(ge=0, le=2**20)]
BLUR = Annotated[int, Field(ge=0, le=256)]


class Theirs(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Making(Theirs):
    """What txt2img and img2img share. None of a size or number is the model's own."""

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0.0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = True
    infotext: str | None = None
    denoising_strength: float | None = None


class Txt2Img(Making):
    pass


class Img2Img(Making):
    init_images: list[str] | None = None
    resize_mode: int | None = 0
    mask: str | None = None
    mask_blur: BLUR | None = None
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: PADDING | None = 0
    inpainting_mask_invert: int | None = 0
    include_init_images: bool | None = False


class PngInfo(Theirs):
    image: str


class Extras(Theirs):
    resize_mode: int | None = 0
    upscaling_resize: float | None = 2
    upscaling_resize_w: SIZES | None = 512
    upscaling_resize_h: SIZES | None = 512
    upscaling_crop: bool | None = True
    upscaler_1: str | None = "None"


class ExtraImage(Extras):
    image: str


class NamedImage(Theirs):
    data: str
    name: str = ""


class ExtraBatch(Extras):
    imageList: list[NamedImage]


NOTHING: tuple[Any, ...] = (None, False, 0, "", -1)
# field -> values at which it changes nothing; what to do in its place
INERT: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "enable_hr": (NOTHING, "run img2img on the result, at the larger width and height"),
    "restore_faces": (NOTHING, "leave it out: there is no model for it here"),
    "tiling": (NOTHING, "leave it out: pictures here have edges"),
    "styles": ((None, []), "write the style's words into the prompt"),
    "script_name": (NOTHING, "leave it out: scripts do not run here"),
    "save_images": (NOTHING, "take the pictures from the answer: nothing is written here"),
    "seed_resize_from_h": (NOTHING, "leave it out"),
    "seed_resize_from_w": (NOTHING, "leave it out"),
    "s_churn": (NOTHING, "leave it out, or take an ancestral sampler"),
    "s_tmin": (NOTHING, "leave it out"),
    "s_min_uncond": (NOTHING, "leave it out"),
    "refiner_checkpoint": (NOTHING, "leave it out"),
    "initial_noise_multiplier": ((None, 1), "leave it out, or change denoising_strength"),
    "latent_mask": ((None, ""), "send `mask`"),
    "gfpgan_visibility": (NOTHING, "leave it out: there is no model for it here"),
    "codeformer_visibility": (NOTHING, "leave it out: there is no model for it here"),
    "extras_upscaler_2_visibility": (NOTHING, "leave it out, and take upscaler_1 alone"),
    "controlnet_units": ((None, []), "leave it out: there is no ControlNet here"),
}
# fields of theirs that change nothing here whatever they are
MOOT = frozenset(
    "firstphase_width firstphase_height hr_scale hr_upscaler hr_second_pass_steps hr_resize_x"
    " hr_resize_y hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt"
    " do_not_save_samples do_not_save_grid s_tmax script_args image_cfg_scale force_task_id"
    " disable_extra_networks refiner_switch_at firstpass_image comments mask_blur_x mask_blur_y"
    " mask_round show_extras_results codeformer_weight upscale_first upscaler_2".split()
)


def check_inert(body: Theirs) -> list[str]:
    """The names of fields that are nobody's, and are ignored. Raises RequestError."""
    extra = {} if body.model_extra is None else body.model_extra
    for name, value in extra.items():
        inert, instead = INERT.get(name, ((value,), ""))
        if value not in inert:
            raise RequestError(f"{name} is {_short(value)}: that is not done here", hint=instead)
    scripts = getattr(body, "alwayson_scripts", None)
    for name, script in ({} if scripts is None else scripts).items():
        if _asks(script):
            raise RequestError(
                f"the script {name[:80]!r} is not here", hint="leave it out of alwayson_scripts"
            )
    return [name for name in extra if name not in INERT and name not in MOOT]


def _asks(script: Any) -> bool:
    """Whether a script is asked for anything: its first argument is true, or a unit enabled."""
    args = script.get("args", []) if isinstance(script, dict) else script
    if not isinstance(args, list):
        return bool(args)
    return any(
        argument.get("enabled", True) if isinstance(argument, dict) else bool(argument)
        for argument in args
    )


def _short(value: Any) -> str:
    return repr(value)[:60]
