"""The page's tabs and widgets: one tab a task, all of them from the table TABS.

Every number is a line of text: what is left empty is the task's own default, which it shows.

checked by  tests/http/test_ui.py, in a real browser
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..engine.request import DEFAULTS
from ..engine.schedule import SCHEDULES
from ..engine.solvers import SOLVERS
from .ui_run import Page

if TYPE_CHECKING:
    from .served import Served

KEPT_S = 3600  # what was uploaded is removed after this time, and looked through as often


@dataclass(frozen=True)
class Tab:
    """variants     of bundles that can do it
    takes           its own inputs, names of FIELDS, in their order
    """

    title: str
    task: str
    variants: tuple[str, ...]
    takes: tuple[str, ...]


TABS = (
    Tab("Text to picture", "txt2img", ("base",), ("width", "height")),
    Tab("Picture to picture", "img2img", ("base",), ("image", "strength")),
    Tab("Inpainting", "inpaint", ("base", "inpainting"), ("drawn", "strength", "mask_blur")),
    Tab("Depth", "depth2img", ("depth",), ("image", "depth", "strength")),
    Tab("Upscale", "upscale", ("x4-upscaler",), ("image", "noise_level")),
    Tab("Mix", "unclip", ("unclip-h", "unclip-l"), ("images", "weights", "noise_level")),
)
COMMON = (
    "model", "prompt", "negative_prompt", "steps", "guidance", "seed", "count", "sampler",
    "schedule",
)  # fmt: skip


def _number(label: str, name: str, usual: str = "") -> Callable[[str], Any]:
    """A line whose placeholder is the task's default, or else `usual`."""

    def make(task: str) -> Any:
        told = DEFAULTS[task].get(name)
        return gr.Textbox(label=label, placeholder=usual if told is None else f"{told:g}")

    return make


def _words(label: str, lines: int = 1) -> Any:
    return gr.Textbox(label=label, lines=lines, max_lines=8)


def _choice(label: str, names: Sequence[str], value: str | None = None) -> Any:
    return gr.Dropdown(list(names), value=value, label=label)


def _picture(label: str) -> Any:
    return gr.Image(
        type="filepath", image_mode=None, format="png", label=label, sources=["upload", "clipboard"]
    )


def _drawing(label: str) -> Any:
    brush = gr.Brush(default_size=24, colors=["#ff00aa"], color_mode="fixed")
    return gr.ImageEditor(
        type="pil", format="png", label=label, brush=brush, sources=["upload", "clipboard"],
        transforms=(), layers=False,
    )  # fmt: skip


def _several(label: str) -> Any:
    return gr.Gallery(
        type="filepath", format="png", label=label, interactive=True, sources=["upload"], height=200
    )


# name -> the widget of a task; what is left empty is the task's own default
FIELDS: Mapping[str, Callable[[str], Any]] = {
    "prompt": lambda task: _words("Prompt", 2),
    "negative_prompt": lambda task: _words("Negative prompt"),
    "steps": _number("Steps", "steps"),
    "guidance": _number("Guidance", "guidance"),
    "seed": _number("Seed", "seed", "drawn"),
    "count": _number("Pictures", "count", "1"),
    "sampler": lambda task: _choice(f"Sampler ({DEFAULTS[task]['sampler']})", sorted(SOLVERS)),
    "schedule": lambda task: _choice("Schedule (the sampler's own)", sorted(SCHEDULES)),
    "width": _number("Width", "width", "the model's"),
    "height": _number("Height", "height", "the model's"),
    "strength": _number("Strength", "strength"),
    "noise_level": _number("Noise level", "noise_level"),
    "mask_blur": _number("Blur of the mask's edge", "mask_blur", "0"),
    "weights": lambda task: _words("Weights, one a picture: 0.6, 0.4"),
    "image": lambda task: _picture("Picture"),
    "depth": lambda task: _picture("Its depth (made, if left empty)"),
    "images": lambda task: _several("Pictures to mix"),
    "drawn": lambda task: _drawing("Picture; paint over what is to be made anew"),
}


def page(served: Served, home: Path) -> Any:
    """The blocks of the page. home: where made pictures lie until they are too many."""
    runs = Page(served, home)
    with gr.Blocks(
        title="sdengine", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)
    ) as blocks:
        blocks.queue(default_concurrency_limit=None, api_open=False)
        history = gr.State([])
        with gr.Tabs():
            for tab in TABS:
                with gr.Tab(tab.title, id=tab.task):
                    _tab(tab, runs, history)
            with gr.Tab("History", id="history"):
                _history(blocks, runs, history)
    return blocks


def _tab(tab: Tab, runs: Page, history: Any) -> None:
    models = [m.name for m in runs.served.models if m.facts.variant in tab.variants]
    if not models:
        gr.Markdown(
            f"No model served here can do this: it takes one of kind {' or '.join(tab.variants)}.\n"
            "\nStart the server with one more: `sdengine serve --ui --model BUNDLE`."
        )
        return
    given: dict[str, Any] = {}
    job = gr.State("")
    with gr.Row():
        with gr.Column(scale=1):
            for name in ("prompt", "negative_prompt", *_pictures(tab)):
                given[name] = _field(tab, name)
            with gr.Row():
                start = gr.Button("Make", variant="primary", elem_id=f"{tab.task}-make")
                stop = gr.Button("Cancel", elem_id=f"{tab.task}-cancel")
            with gr.Accordion("More", open=False):
                given["model"] = _choice("Model", models, models[0])
                for name in (*tab.takes, *COMMON):
                    if name not in given:
                        given[name] = _field(tab, name)
        with gr.Column(scale=1):
            said = gr.Markdown("Ready.", elem_id=f"{tab.task}-said")
            rough = gr.Image(
                label="On its way", interactive=False, height=200, format="png", buttons=[]
            )
            made = gr.Gallery(
                label="Pictures", type="filepath", format="png", interactive=False, height=420,
                object_fit="contain", elem_id=f"{tab.task}-made",
            )  # fmt: skip
    outputs = [job, said, rough, made, history]
    start.click(
        partial(runs.make, tab.task, tuple(given)), [history, *given.values()], outputs,
        api_visibility="private", show_progress="hidden", concurrency_limit=None,
    )  # fmt: skip
    stop.click(
        runs.cancel, [job], None, api_visibility="private", show_progress="hidden",
        concurrency_limit=None,
    )  # fmt: skip


def _field(tab: Tab, name: str) -> Any:
    widget = FIELDS[name](tab.task)
    widget.elem_id = f"{tab.task}-{name}"
    return widget


def _pictures(tab: Tab) -> list[str]:
    return [name for name in tab.takes if name in ("image", "depth", "images", "drawn", "weights")]


def _history(blocks: Any, runs: Page, history: Any) -> None:
    shown = gr.Gallery(
        label="Made in this session", type="filepath", format="png", interactive=False, columns=6,
        height=420, object_fit="contain",
        elem_id="history-made",
    )  # fmt: skip
    how = gr.Textbox(label="How it was made", lines=6, buttons=["copy"], elem_id="history-how")
    history.change(runs.shown, [history], [shown], api_visibility="private")

    def chosen(made: list[Any], event: gr.SelectData) -> str:
        return runs.how(made, event.index)

    shown.select(chosen, [history], [how], api_visibility="private")
