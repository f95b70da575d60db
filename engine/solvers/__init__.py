"""Samplers: each a function from a schedule to a table of rows.

None of them sees a latent. Adding one means writing its coefficients, and a line in SOLVERS.
checked by tests/laws, tests/parity/test_diffusers_schedulers.py, tests/golden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from ..errors import RequestError, UnknownName
from ..levels import Schedule
from ..table import Prediction, Table
from . import names
from .adams import deis, ipndm, lms, plms
from .corrected import sa_solver, unipc
from .first import ddim, euler, lcm, tcd
from .multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m, dpmpp_3m_sde
from .singlestep import dpm2, dpm2_a, dpmpp_2s, dpmpp_2s_a, dpmpp_sde, heun, restart


@dataclass(frozen=True)
class Solver:
    """A sampler by name.

    schedule    what it runs on unless asked otherwise
    title       as AUTOMATIC1111 writes it, for a picture's metadata
    eta         whether it takes one
    default_eta what it is when none is asked for: 0 deterministic, 1 the paper's full noise
    calls       network calls a step
    noisy       whether it draws noise even without an eta
    """

    table: Callable[..., Table]
    schedule: str
    title: str
    eta: bool = False
    default_eta: float = 0.0
    calls: int = 1
    noisy: bool = False


def _ancestral(table: Callable[..., Table], schedule: str, title: str, calls: int = 1) -> Solver:
    return Solver(table, schedule, title, eta=True, default_eta=1.0, calls=calls)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "leading", "DDIM", eta=True),
    "plms": Solver(plms, "leading", "PLMS"),
    "euler": Solver(euler, "linspace", "Euler"),
    "euler_a": _ancestral(ddim, "linspace", "Euler a"),
    "heun": Solver(heun, "linspace", "Heun", calls=2),
    "restart": Solver(restart, "karras", "Restart", calls=2, noisy=True),
    "lms": Solver(lms, "linspace", "LMS"),
    "lms_2": Solver(partial(lms, order=2), "linspace", "LMS order 2"),
    "lms_3": Solver(partial(lms, order=3), "linspace", "LMS order 3"),
    "ipndm": Solver(ipndm, "linspace", "iPNDM"),
    "deis_2": Solver(partial(deis, order=2), "trailing", "DEIS order 2"),
    "deis": Solver(deis, "trailing", "DEIS"),
    "dpm2": Solver(dpm2, "karras", "DPM2", calls=2),
    "dpm2_a": _ancestral(dpm2_a, "karras", "DPM2 a", calls=2),
    "dpmpp_2s": Solver(dpmpp_2s, "uniform", "DPM++ 2S"),
    "dpmpp_2s_a": _ancestral(dpmpp_2s_a, "karras", "DPM++ 2S a", calls=2),
    "dpmpp_2m": Solver(dpmpp_2m, "uniform", "DPM++ 2M"),
    "dpmpp_3m": Solver(dpmpp_3m, "uniform", "DPM++ 3M"),
    "dpmpp_2m_sde": _ancestral(dpmpp_2m_sde, "exponential", "DPM++ 2M SDE"),
    "dpmpp_2m_sde_heun": _ancestral(dpmpp_2m_sde_heun, "exponential", "DPM++ 2M SDE Heun"),
    "dpmpp_3m_sde": _ancestral(dpmpp_3m_sde, "exponential", "DPM++ 3M SDE"),
    "dpmpp_sde": _ancestral(dpmpp_sde, "karras", "DPM++ SDE", calls=2),
    "unipc_2": Solver(unipc, "trailing", "UniPC order 2"),
    "unipc_3": Solver(partial(unipc, order=3), "trailing", "UniPC order 3"),
    "unipc_2_bh1": Solver(partial(unipc, variant="bh1"), "trailing", "UniPC order 2 bh1"),
    "unipc_3_bh1": Solver(partial(unipc, order=3, variant="bh1"), "trailing", "UniPC"),
    "sa_solver": _ancestral(sa_solver, "trailing", "SA-Solver"),
    "lcm": Solver(lcm, "lcm", "LCM", noisy=True),
    "tcd": Solver(tcd, "lcm", "TCD", eta=True, default_eta=0.3),
}


def find(name: str) -> Solver:
    """Raises UnknownName with the nearest known names."""
    if name not in SOLVERS:
        raise UnknownName("sampler", name, SOLVERS)
    return SOLVERS[name]


def resolve(name: str) -> tuple[str, str | None]:
    """(sampler, schedule or None) of a name as other tools write it: `DPM++ 2M Karras`.

    raises      UnknownName, RequestError
    """
    return names.resolve(name, {own: solver.title for own, solver in SOLVERS.items()})


def make(
    name: str,
    schedule: Schedule,
    prediction: Prediction,
    eta: float | None = None,
    s_noise: float = 1.0,
) -> Table:
    """The table of sampler `name`.

    eta         None takes the sampler's own default; one that takes none accepts 0
    s_noise     what all noise of the rows is multiplied by
    raises      UnknownName; RequestError when eta or s_noise does not apply, and for an eps model
                on levels that begin (almost) without a picture
    """
    solver = find(name)
    if not solver.eta and eta:
        refuse_eta(name, eta)
    if not (solver.eta or solver.noisy) and s_noise != 1.0:
        raise RequestError(
            f"sampler {name!r} draws no noise and takes no s_noise (got {s_noise:g})",
            hint=f"leave s_noise out, or use one of: {_takers()}",
        )
    if prediction == "eps" and schedule.alphas[0] < 1e-3:
        raise RequestError(
            f"an eps model cannot start at alpha {schedule.alphas[0]:.2g}: x holds no picture",
            hint="zero terminal SNR is for v models: leave it out",
        )
    if not solver.eta:
        table = solver.table(schedule, prediction)
    else:
        table = solver.table(schedule, prediction, solver.default_eta if eta is None else eta)
    return table if s_noise == 1.0 else replace(table, n=table.n * s_noise)


def _takers() -> str:
    return ", ".join(n for n, s in SOLVERS.items() if s.eta)


def refuse_eta(name: str, eta: float) -> NoReturn:
    raise RequestError(
        f"sampler {name!r} takes no eta (got {eta:g})",
        hint=f"leave eta out, or use one of: {_takers()}",
    )
