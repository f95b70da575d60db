"""What the page does: one click is one job, followed to its end.

checked by  tests/http/test_ui.py
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from PIL import Image

from ..engine.errors import RequestError, SdengineError
from ..engine.request import Request
from .asks import Ask, Made, Pictures
from .encode import encoded, metadata
from .jobs import Job, Rough
from .served import Served, chosen

BETWEEN_S = 0.2  # two looks at a run: each is sent to the browser
KEPT = 500  # picture files of all sessions together
WHOLE = ("steps", "seed", "count", "width", "height", "noise_level")
REAL = ("guidance", "strength", "mask_blur")
AS_THEY_ARE = ("prompt", "negative_prompt", "sampler", "schedule")


@dataclass(frozen=True)
class Kept:
    """One picture of the history: its file, and how it was made."""

    file: str
    text: str


class Page:
    """served   the server that the page is part of
    home        where the files of made pictures lie
    """

    def __init__(self, served: Served, home: Path) -> None:
        self.served = served
        self._home = home
        self._jobs: dict[str, Job] = {}
        self._files: list[Path] = []

    async def make(
        self, task: str, names: Sequence[str], history: list[Kept], *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Yields (job, what is said, preview, pictures, history); `names` are those of `values`."""
        import gradio as gr

        same = gr.skip()
        given = dict(zip(names, values, strict=True))
        try:
            ask = await asyncio.to_thread(_ask, task, given)
            job = self.served.submit(ask)
        except SdengineError as error:
            yield "", _trouble(error), None, None, same
            return
        self._jobs[job.id] = job
        try:
            yield job.id, "Waiting ...", None, None, same
            async for said, rough in _looks(job):
                yield job.id, said, rough, same, same
            if job.error is not None:
                yield "", _trouble(job.error), None, None, same
                return
            new = await asyncio.to_thread(self._keep_all, job)
            said = f"{len(new)} made in {_seconds(job):.1f} s."
            told = [said, *(f"Warning: {text}" for text in job.warnings)]
            files = [
                (one.file, f"seed {m.request.seed}") for one, m in zip(new, job.made, strict=True)
            ]
            yield "", "\n\n".join(told), None, files, [*new, *history]
        finally:  # the reader may have closed the page
            self.served.pool.cancel(job)
            del self._jobs[job.id]

    def cancel(self, id: str) -> None:
        """It stops at its next step; one that is over stays as it is."""
        if id in self._jobs:
            self.served.pool.cancel(self._jobs[id])

    def shown(self, history: list[Kept]) -> list[str]:
        return [one.file for one in history if Path(one.file).is_file()]

    def how(self, history: list[Kept], index: int) -> str:
        there = [one for one in history if Path(one.file).is_file()]
        return there[index].text

    def _keep_all(self, job: Job) -> list[Kept]:
        return [self._keep(job, i, made) for i, made in enumerate(job.made)]

    def _keep(self, job: Job, index: int, made: Made) -> Kept:
        """The picture as a file, with its metadata in it; the oldest go when they are too many."""
        path = self._home / f"{job.id}-{index}.png"
        path.write_bytes(encoded(made))
        self._files.append(path)
        while len(self._files) > KEPT:
            self._files.pop(0).unlink(missing_ok=True)
        return Kept(str(path), metadata(made).parameters)


async def _looks(job: Job) -> AsyncIterator[tuple[str, Image.Image | None]]:
    """How far the job is, not oftener than a browser can show."""
    last = 0.0
    async for _, event in job.follow():
        now = monotonic()
        if event.kind == "started":
            yield "Running ...", None
        elif event.kind == "step" and now - last >= BETWEEN_S:
            last = now
            yield f"Step {job.step} of {job.steps}, {job.progress:.0%}", _picture(job.rough)


def _picture(rough: Rough | None) -> Image.Image | None:
    if rough is None:
        return None
    small = Image.frombytes("RGB", (rough.width, rough.height), rough.pixels)
    return small.resize((rough.width * 8, rough.height * 8), Image.Resampling.BILINEAR)


def _seconds(job: Job) -> float:
    assert job.ended is not None
    return job.ended - job.asked


def _trouble(error: SdengineError) -> str:
    return f"**{error.message}**\n\n{error.hint}"


def _ask(task: str, given: dict[str, Any]) -> Ask:
    """The page's inputs as a request. Raises RequestError for what makes no sense."""
    fields = {name: given[name] for name in AS_THEY_ARE}
    fields |= {name: _number(name, given.get(name), int) for name in WHOLE}
    fields |= {name: _number(name, given.get(name), float) for name in REAL}
    if given.get("weights"):
        fields["weights"] = _weights(given["weights"])
    request = Request.from_dict(chosen({**fields, "task": task}))
    return Ask(given["model"], request, _pictures(given), "page")


def _number(name: str, text: str | None, kind: type[int] | type[float]) -> float | None:
    """None where the line is empty."""
    if text is None or not text.strip():
        return None
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(
            f"{name.replace('_', ' ')} is {text[:40]!r}; {what} was expected",
            hint="left empty, it takes the value that it shows",
        ) from None


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(
            f"the weights are {text!r}; numbers with commas between were expected",
            hint="one for each picture: 0.6, 0.4",
        ) from None


def _pictures(given: dict[str, Any]) -> Pictures:
    """What was uploaded, byte for byte; what was painted, as a mask in which white is made anew."""
    if given.get("drawn") is not None:
        return _painted(given["drawn"])
    files = [given["image"]] if given.get("image") else []
    files += [file for file, _ in given.get("images") or []]
    depth = given.get("depth")
    return Pictures(
        tuple(Path(file).read_bytes() for file in files),
        depth=Path(depth).read_bytes() if depth else None,
    )


def _painted(drawn: dict[str, Any]) -> Pictures:
    below = drawn["background"]
    if below is None:
        raise RequestError("there is no picture to paint on", hint="put one into the field first")
    mask = Image.new("L", below.size, 0)
    for layer in drawn["layers"]:
        mask.paste(255, (0, 0), layer.getchannel("A").point(lambda a: 255 * (a > 0)))
    if mask.getbbox() is None:
        raise RequestError("nothing is painted over", hint="paint over what is to be made anew")
    return Pictures((_png(below),), _png(mask))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()
