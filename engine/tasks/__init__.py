"""Tasks: what a run makes of which pictures, and with which models.

A task is one function, `prepare(work)`, which does once what all pictures of the run share and
returns `begin(streams)`, which starts one of them from its own noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..bundle import ModelFacts, Variant
from ..errors import RequestError, UnknownName
from ..given import Given
from . import depth2img, img2img, inpaint, txt2img, unclip, upscale
from .work import Begin, Beginning, Streams, Work

__all__ = ["TASKS", "Begin", "Beginning", "Streams", "Task", "Work", "choose"]


@dataclass(frozen=True)
class Task:
    """images   how many pictures it takes, at least and at most
    mask        whether it needs one
    depth       whether it can be given a depth map
    placed      whether the picture lies on the canvas, and sets its size
    """

    name: str
    prepare: Callable[[Work], Begin]
    variants: tuple[Variant, ...]
    images: tuple[int, int] = (1, 1)
    mask: bool = False
    depth: bool = False
    placed: bool = True


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("txt2img", txt2img.prepare, ("base",), images=(0, 0), placed=False),
        Task("img2img", img2img.prepare, ("base",)),
        Task("inpaint", inpaint.prepare, ("inpainting", "base"), mask=True),
        Task("depth2img", depth2img.prepare, ("depth",), depth=True),
        Task("upscale", upscale.prepare, ("x4-upscaler",)),
        Task("unclip", unclip.prepare, ("unclip-h", "unclip-l"), images=(1, 16), placed=False),
    )
}
# what a model of a variant is, for messages, and the pictures that it cannot do without
_MODELS: Mapping[Variant, tuple[str, str]] = {
    "base": ("a text-to-image model", ""),
    "inpainting": ("an inpainting model", "--image and --mask"),
    "depth": ("a depth-to-image model", "--image"),
    "x4-upscaler": ("an upscaler", "--image"),
    "unclip-h": ("a model of picture variations", "--image"),
    "unclip-l": ("a model of picture variations", "--image"),
}


def choose(facts: ModelFacts, name: str | None, given: Given) -> Task:
    """The task called `name`, or the one that follows from the model and the pictures given.

    raises      UnknownName; RequestError, with the reason, where the three do not go together
    """
    if name is not None and name not in TASKS:
        raise UnknownName("task", name, TASKS)
    fitting = [t for t in TASKS.values() if facts.variant in t.variants]
    kind, needs = _MODELS[facts.variant]
    if name is not None:
        if TASKS[name] not in fitting:
            raise RequestError(
                f"{facts.name} is {kind}: it cannot do {name}",
                hint=f"with this model: {', '.join(t.name for t in fitting)}; for {name}, a bundle"
                f" of variant {' or '.join(TASKS[name].variants)}",
            )
        _check_pictures(TASKS[name], f"task {name}", given)
        return TASKS[name]
    if needs and not given.images:
        raise RequestError(
            f"{facts.name} is {kind}, which needs more than a prompt", hint=f"give it {needs}"
        )
    masked = [t for t in fitting if t.mask == (given.mask is not None)]
    found = len(given.images)
    task = min(masked or fitting, key=lambda t: max(t.images[0] - found, found - t.images[1]))
    _check_pictures(task, kind, given)
    return task


def _check_pictures(task: Task, who: str, given: Given) -> None:
    low, high = task.images
    found = len(given.images)
    if not low <= found <= high:
        asked = {(0, 0): "no picture", (1, 1): "one picture"}.get(
            task.images, f"{low} to {high} pictures"
        )
        raise RequestError(
            f"{who} takes {asked}; {found} given",
            hint="give --image once for each picture that it takes, or another task"
            if high
            else "leave --image out, or name a task that takes one: img2img, inpaint",
        )
    if task.mask and given.mask is None:
        raise RequestError(
            f"{who} needs a mask: which part of the picture is to be repainted",
            hint="give --mask: a picture whose white is repainted",
        )
    if not task.mask and given.mask is not None:
        raise RequestError(
            f"{who} takes no mask", hint="leave --mask out, or take a model that can inpaint"
        )
    if not task.depth and given.depth is not None:
        raise RequestError(
            f"{who} takes no depth map", hint="leave --depth out, or take a depth-to-image model"
        )
