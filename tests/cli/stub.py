"""The command line on a model that draws plain squares: `python stub.py MODE ARGUMENTS...`

MODE    quick       a step takes no time
        slow        a step takes 50 ms, and the first picture is saved at once
        refuse      the run ends in a NumericsError
        crash       the run ends in a KeyError
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from sdengine import api, cli
from sdengine.engine import tokenizer
from sdengine.engine.errors import NumericsError
from sdengine.engine.pipeline import Picture, Result
from sdengine.engine.request import Progress, Request, Timings

ABOUT = {"model": "stub", "bundle": "0" * 16, "backend": "fake", "precision": "f32"}


class StubPipeline:
    """What `api.load` gives, as far as the command line uses it."""

    def __init__(self, mode: str) -> None:
        self.mode, self.about = mode, ABOUT
        self.requests: list[Request] = []
        self.closed = False

    def __enter__(self) -> StubPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def stream(
        self, request: Request, *, on_step: Callable[[Progress], None], **pictures: Any
    ) -> Iterator[Result]:
        self.requests.append(request)
        self.pictures = pictures
        tokenizer.clean(request.prompt)
        ran = request.completed("txt2img", (64, 64))
        result = Result(ran, timings=Timings(rows=[0.014] * ran.steps, total=0.5))
        if self.mode == "refuse":
            raise NumericsError("NaN in `unet` at step 3", hint="use --precision f32")
        if self.mode == "crash":
            raise KeyError("latent")
        for index in range(ran.count):
            for step in range(ran.steps):
                time.sleep(0.05 if self.mode == "slow" and index > 0 else 0)
                on_step(Progress(index, ran.count, step + 1, ran.steps, 0.014))
            own = ran.own(index)
            image = Image.new("RGB", (ran.width or 0, ran.height or 0), "orange")
            result.pictures.append(Picture(image, own, None, ABOUT))  # type: ignore[arg-type]
            if len(ran.prompt) > 300:
                result.warnings.append("the prompt is too long; this was cut off: ...")
            yield result


class StubLoad:
    """In the place of `api.load`; remembers how it was called."""

    def __init__(self, mode: str = "quick") -> None:
        self.pipeline = StubPipeline(mode)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **options: Any) -> StubPipeline:
        assert not args
        report = options.pop("progress")
        report("exporting unet", 0.5)
        self.calls.append(options)
        return self.pipeline


if __name__ == "__main__":
    api.load = StubLoad(sys.argv.pop(1))  # type: ignore[assignment]
    cli.main()
