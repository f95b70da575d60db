"""Calibration: what the networks of a bundle take in real runs of that very checkpoint.

Prompts are drawn with the bundle's own engine, through the runtime's pipeline, and what each
network is fed with is kept: texts, latents at every noise level of the run, latents to decode.

checked by  tests/parity/test_quantize.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..engine.bundle import Bundle
from ..engine.errors import RequestError
from ..engine.pipeline import Pipeline
from ..engine.ports import Array, Backend, Session
from ..engine.request import Request
from ..engine.spec import ComponentSpec, Precision, Profile
from .record import SMALL_SIDE

STEPS = 8  # noise levels of a run
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red fox in the snow, detailed fur",
    "portrait of an old fisherman, oil painting",
    "a bowl of fruit on a wooden table",
    "city skyline at night, long exposure",
    "a smiling face with sunglasses",
)
MOST_PROMPTS = 32
LONGEST = 2000  # characters of one prompt

Feeds = Mapping[str, Array]
Report = Callable[[str, float], None]


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, UTF-8; empty lines and those that begin with # are left out.

    raises      RequestError: no such file, not text, no prompt in it, too many, too long
    """
    hint = "give a UTF-8 text file with one prompt a line, for instance 12 that you would draw"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--calibration {path}: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--calibration {path}: not UTF-8 text, from byte {error.start} on", hint=hint
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise RequestError(f"--calibration {path}: no prompt in it", hint=hint)
    if len(prompts) > MOST_PROMPTS:
        raise RequestError(
            f"--calibration {path}: {len(prompts)} prompts; at most {MOST_PROMPTS} are used",
            hint="keep the most different prompts: time and memory grow with each",
        )
    if long := next((p for p in prompts if len(p) > LONGEST), None):
        raise RequestError(
            f"--calibration {path}: a prompt of {len(long)} characters; at most {LONGEST}",
            hint=hint,
        )
    return prompts


def record_runs(
    bundle: Bundle,
    backend: Backend,
    precision: Precision,
    prompts: Sequence[str],
    report: Report,
) -> dict[str, list[Feeds]]:
    """component -> the feeds of its calls, in order.

    Every prompt is drawn once, at native size or SMALL_SIDE pixels, whichever is smaller.

    precision   of the engine that draws: float32, or bfloat16 where that is to be had
    """
    calls: dict[str, list[Feeds]] = {}
    sessions = _Sessions(bundle, backend, precision, calls)
    height, width = (min(side, SMALL_SIDE) for side in bundle.facts.native_size)
    with Pipeline(bundle, sessions, {}) as pipeline:
        for i, prompt in enumerate(prompts):
            report(f"calibration: {prompt[:40]}", i / len(prompts))
            pipeline(Request(prompt, steps=STEPS, seed=i, height=height, width=width))
    return calls


class _Sessions:
    """The networks of a bundle, each loaded once a shape; what they are fed with is kept."""

    def __init__(
        self, bundle: Bundle, backend: Backend, precision: Precision, calls: dict[str, list[Feeds]]
    ) -> None:
        self._bundle, self._backend, self._precision = bundle, backend, precision
        self._calls = calls
        self._open: dict[tuple[str, Profile], Session] = {}

    def __call__(self, component: str, dims: Mapping[str, int], *, paired: bool = False) -> Session:
        profile = Profile(dims, self._precision, paired=paired)
        key = component, profile
        if key not in self._open:
            self._open[key] = self._backend.load(self._bundle.component(component), profile)
        calls = self._calls.setdefault(component, [])
        return _Recorder(self._open[key], calls, {})

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class _Recorder:
    """A session that keeps what it is fed with."""

    def __init__(self, session: Session, calls: list[Feeds], held: Feeds) -> None:
        self._session, self._calls, self._held = session, calls, held

    @property
    def spec(self) -> ComponentSpec:
        return self._session.spec

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self._calls.append({n: np.array(v) for n, v in {**self._held, **feeds}.items()})
        return self._session(feeds)

    def bind(self, feeds: Feeds) -> Session:
        return _Recorder(self._session.bind(feeds), self._calls, {**self._held, **feeds})

    def graph(self, name: str) -> Session:
        return _Recorder(self._session.graph(name), self._calls, self._held)

    def close(self) -> None:
        self._session.close()
