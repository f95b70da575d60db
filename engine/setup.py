"""What a run is, before any network is called: its canvas, its schedule, its table.

Everything that can be refused without a network is refused here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from . import canvas as canvases
from . import columns, memory, presets, schedule, solvers
from .bundle import Bundle, ModelFacts
from .canvas import Canvas
from .errors import RequestError
from .given import Given
from .inputs import PlacedMask, open_mask, open_picture, place, place_mask
from .levels import Schedule, Training
from .ports import Open
from .request import MAX_SIDE, Request
from .solvers import custom
from .table import Table
from .tasks import Task, Work
from .tasks.work import Statistics

# A picture with so many times the pixels of the model's own size, or so few, is warned of: 768x768
# for a model of 512x512 and the other way round, but not 512x768.
UNUSUAL = 2.0


@dataclass(frozen=True)
class Setting:
    """A run whose parts fit together. `request` has nothing left open."""

    facts: ModelFacts
    request: Request
    given: Given
    table: Table
    canvas: Canvas
    mask: PlacedMask | None
    plan: memory.Plan
    warnings: Sequence[str]

    def work(self, open_session: Open, statistics: Statistics) -> Work:
        return Work(
            self.facts, self.request, self.given, open_session, self.table, self.canvas,
            self.mask, self.plan.vae_tile, statistics, self.plan.cuts,
        )  # fmt: skip


def set_up(
    task: Task, bundle: Bundle, request: Request, given: Given, available: int | None
) -> Setting:
    """available   bytes of memory that the run may take; None: not known, nothing is tiled

    raises      RequestError; StorageError for a picture that cannot be read
    """
    warnings: list[str] = []
    facts = bundle.facts
    _check_extras(task, facts, request, given)
    picture = None
    if task.placed:
        picture = open_picture(given.images[0], background=request.background)
    canvas = _canvas(task, facts, request, picture, warnings)
    mask = _mask(request, given, canvas, picture) if task.mask else None
    graphs = bundle.component("unet").graphs
    table = _table(task, facts, request, graphs, warnings)
    plan = memory.plan(
        bundle, canvas.height, canvas.width, available, request.tile, batch=request.batch_size
    )
    if plan.vae_tile is not None or plan.unet_tile is not None:
        warnings.append(plan.reason)
    if task.name != "upscale":
        _say_unusual(canvas.size, facts, warnings)
    height, width = canvas.size
    if not task.placed or request.width is not None or request.height is not None:
        request = replace(request, height=height, width=width)
    return Setting(facts, request, given, table, canvas, mask, plan, warnings)


def _table(
    task: Task,
    facts: ModelFacts,
    request: Request,
    graphs: Collection[str],
    warnings: list[str],
) -> Table:
    assert request.guidance is not None
    assert request.cache is not None
    assert request.cut is not None
    table = _rows(task, facts, request, warnings)
    if request.guidance_scales is not None:
        table = columns.guided_by(table, request.guidance_scales)
    elif request.cfg_plus_plus is not None:
        table = columns.cfg_plus_plus(table, request.cfg_plus_plus)
    else:
        interval = request.guidance_interval if request.guidance != 1.0 else None
        table = presets.with_guidance(table, request.guidance, interval)
    table = presets.with_cache(table, request.cache, request.cut)
    if lacking := sorted(set(table.graphs) - set(graphs)):
        raise RequestError(
            f"{facts.name} has no graph {' and no '.join(lacking)} of its UNet: a feature cache"
            f" needs them; it has {', '.join(graphs)}",
            hint="export the checkpoint again, or run without: --cache 1",
        )
    return table


def _rows(task: Task, facts: ModelFacts, request: Request, warnings: list[str]) -> Table:
    """The solver's table, on its levels."""
    if request.solver is not None:
        if request.strength is not None and request.strength < 1.0:
            raise RequestError(
                "a solver's file brings its own levels, which cannot be cut to a strength",
                hint="take --strength 1, or a sampler by name",
            )
        return custom.load(request.solver).table(_training(facts, request), facts.prediction)
    assert request.sampler is not None
    levels = _levels(task, facts, request, warnings)
    return solvers.make(request.sampler, levels, facts.prediction, request.eta, request.s_noise)


def _training(facts: ModelFacts, request: Request) -> Training:
    trained = facts.schedule
    training = Training.scaled_linear(trained.beta_start, trained.beta_end, trained.timesteps)
    return training.zero_snr() if request.zero_snr else training


def _check_extras(task: Task, facts: ModelFacts, request: Request, given: Given) -> None:
    if request.weights is not None:
        if task.name != "unclip":
            raise RequestError(
                f"{task.name} mixes no pictures and takes no weights",
                hint="leave weights out; they are for models of picture variations",
            )
        if len(request.weights) != len(given.images):
            raise RequestError(
                f"{len(request.weights)} weights for {len(given.images)} pictures",
                hint="give --weight once for each --image, in the same order",
            )
    if task.name == "upscale" and (request.width is not None or request.height is not None):
        raise RequestError(
            "the upscaler makes four times its picture's size and takes no width or height",
            hint="resize the picture before, or the result after",
        )


def _canvas(
    task: Task,
    facts: ModelFacts,
    request: Request,
    picture: Image.Image | None,
    warnings: list[str],
) -> Canvas:
    """Where the picture lies: the size that was asked for or the picture's own, rounded up to what
    the network takes."""
    latent = facts.latent
    if picture is not None:
        scale = latent.factor if task.name == "upscale" else 1
        multiple = latent.multiple * (1 if scale > 1 else latent.factor)
        placed = place(
            picture,
            width=request.width,
            height=request.height,
            resize=request.resize,
            multiple=multiple,
            least=multiple,
        )
        canvas = canvases.around(placed, scale)
        how = "with its edge repeated, and cropped"
    else:
        assert request.height is not None
        assert request.width is not None
        multiple = latent.multiple * latent.factor
        canvas = canvases.blank(request.height, request.width, latent)
        how = "and cropped at the centre"
    if max(canvas.size) > MAX_SIDE:
        raise RequestError(
            f"the result would have {canvas.size[1]}x{canvas.size[0]} pixels; {MAX_SIDE} a side is"
            " the most",
            hint="resize the picture before, or give --width and --height",
        )
    if canvas.padded:
        (height, width), inside = canvas.size, canvas.height // multiple
        warnings.append(
            f"{width}x{height} is no multiple of {canvas.height // inside}: made at"
            f" {canvas.width}x{canvas.height} {how}"
        )
    return canvas


def _say_unusual(size: tuple[int, int], facts: ModelFacts, warnings: list[str]) -> None:
    """What a size far from the training's does to a picture (reference-spec 8)."""
    (height, width), (tall, wide) = size, facts.native_size
    times = height * width / (tall * wide)
    if 1 / UNUSUAL <= times <= UNUSUAL:
        return
    what = "repeat what is on it" if times > 1 else "look coarse or cut off"
    warnings.append(
        f"{facts.name} was trained at {wide}x{tall}: a picture of {width}x{height} may {what}"
    )


def _mask(
    request: Request, given: Given, canvas: Canvas, picture: Image.Image | None
) -> PlacedMask:
    assert given.mask is not None
    assert canvas.placed is not None
    assert picture is not None
    mask = open_mask(
        given.mask,
        (picture.height, picture.width),
        invert=request.invert_mask,
        blur=request.mask_blur,
    )
    return place_mask(mask, canvas.placed, thin=request.thin_mask)


def _levels(task: Task, facts: ModelFacts, request: Request, warnings: list[str]) -> Schedule:
    assert request.steps is not None
    training = _training(facts, request)
    if request.sigmas is not None:
        levels = schedule.from_sigmas(training, request.sigmas)
    elif request.timesteps is not None:
        levels = schedule.from_timesteps(training, request.timesteps)
    else:
        assert request.schedule is not None
        levels = schedule.make(request.schedule, training, request.steps)
    if len(levels) != request.steps:
        warnings.append(f"schedule {levels.name!r} runs {len(levels)} steps, not {request.steps}")
    if request.strength is not None:
        levels = shortened(levels, request.strength, task.name, request)
    if levels.start_scale == 0.0 and levels.timesteps[0] < training.timesteps / 2:
        warnings.append(
            f"schedule {levels.name!r} in {len(levels)} steps begins at timestep"
            f" {levels.timesteps[0]:g}, where a model expects a picture, with noise alone: take"
            " more steps, or --schedule trailing"
        )
    return levels


def shortened(levels: Schedule, strength: float, task: str, request: Request) -> Schedule:
    """The part of a schedule that is run on a picture.

    A strength of 0.29 in 100 steps is 29 calls; the reference's own arithmetic, in `compat`, makes
    28 of them. The reference's depth2img never runs its first call, and at strength 1 forgets the
    picture (reference-spec 3.9).
    """
    compat = request.compat == "reference"
    exact = strength * len(levels)
    calls = int(exact) if compat else int(np.floor(exact + 1e-9))
    if calls < 1:
        raise RequestError(
            f"strength {strength:g} of {len(levels)} steps leaves no step to run",
            hint=f"take a strength of at least {1 / len(levels):.2g}, or more steps",
        )
    if compat and task == "depth2img" and strength == 1.0:
        if len(levels) == 1:
            raise RequestError(
                "the reference's depth2img runs one step less than asked, and 1 was asked",
                hint="take 2 steps or more",
            )
        tail = levels.tail(len(levels) - 1)
        return replace(tail, start_scale=0.0, start_noise=1.0)
    if task == "inpaint" and strength == 1.0:
        return levels  # out of noise alone, as every implementation has it
    return levels.tail(calls, above=compat)
