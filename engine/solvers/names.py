"""What other tools call our samplers, and the schedule that a name may end with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ..errors import RequestError, UnknownName

# Beside a sampler's own name and its title, which are found by themselves.
ALIASES: dict[str, tuple[str, ...]] = {
    "ddim": ("dpmpp_1s", "DDIMScheduler"),
    "plms": ("pndm", "PNDMScheduler", "k_plms"),
    "euler": ("k_euler", "EulerDiscreteScheduler"),
    "euler_a": ("euler_ancestral", "k_euler_ancestral", "EulerAncestralDiscreteScheduler"),
    "heun": ("k_heun", "HeunDiscreteScheduler"),
    "lms": ("k_lms", "lms_4", "LMSDiscreteScheduler"),
    "ipndm": ("IPNDMScheduler",),
    "deis": ("deis_3",),
    "deis_2": ("DEISMultistepScheduler",),
    "dpm2": ("k_dpm_2", "KDPM2DiscreteScheduler"),
    "dpm2_a": ("dpm_2_ancestral", "k_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler",),
    "dpmpp_2s_a": ("dpmpp_2s_ancestral",),
    "dpmpp_2m": ("DPMSolverMultistepScheduler",),
    "dpmpp_sde": ("dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde_gpu",),
    "dpmpp_3m_sde": ("dpmpp_3m_sde_gpu",),
    "unipc_2": ("UniPCMultistepScheduler",),
    "unipc_3": ("uni_pc_bh2",),
    "unipc_3_bh1": ("uni_pc",),
    "sa_solver": ("SASolverScheduler",),
    "lcm": ("LCMScheduler",),
    "tcd": ("TCDScheduler",),
}
SUFFIXES = {
    "karras": "karras",
    "exponential": "exponential",
    "sgmuniform": "sgm_uniform",
    "alignyoursteps": "align_your_steps",
    "simple": "simple",
    "beta": "beta",
    "normal": "linspace",
}
# Samplers that no table holds; docs/samplers.md says more.
ELSEWHERE = {
    "dpmadaptive": "it chooses its steps from what the network answers",
    "dpmfast": "it mixes orders 1 to 3 within a budget of calls, on levels of its own",
    "ddimcfgpp": "CFG++ is a way of guidance: take ddim with it",
}


@lru_cache(maxsize=512)  # every known name is looked at each time that one is resolved
def plain(name: str) -> str:
    """`DPM++ 2S a` and `dpmpp_2s_a` alike: lower case, ++ as pp, letters and digits alone."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))


def resolve(name: str, titles: Mapping[str, str]) -> tuple[str, str | None]:
    """(sampler, schedule or None) of a name as AUTOMATIC1111, ComfyUI or diffusers writes it.

    titles      sampler -> its title
    raises      UnknownName with the nearest names; RequestError for a sampler that no table holds
    """
    known = {plain(title): sampler for sampler, title in titles.items()}
    known |= {plain(alias): sampler for sampler, names in ALIASES.items() for alias in names}
    known |= {plain(sampler): sampler for sampler in titles}
    key = plain(name)
    for ending, schedule in _endings(key):
        if key.removesuffix(ending) in known:
            return known[key.removesuffix(ending)], schedule
    if key in ELSEWHERE:
        raise RequestError(
            f"sampler {name!r} does not fit this engine: {ELSEWHERE[key]}",
            hint="dpmpp_2m and unipc_2 are good in few steps; docs/samplers.md lists the others",
        )
    raise UnknownName("sampler", name, titles)


def _endings(key: str) -> Iterable[tuple[str, str | None]]:
    """The name as it is, then without each schedule that it ends with."""
    yield "", None
    yield from ((ending, name) for ending, name in SUFFIXES.items() if key.endswith(ending))
