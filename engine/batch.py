"""The pictures that go through the network together, from their beginnings to their last latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from .errors import RequestError
from .guidance import Conditions, Guidance
from .loop import Predict, Settle
from .memory import Plan
from .ports import Array, Blend, Floats, Job, Open, State, Step
from .preview import predicted, preview
from .request import Progress, Request
from .state import Saved, needs_features
from .table import Row
from .tasks import Beginning, Streams, Work, inpaint
from .tiles import Tiled

# What may differ between requests that run together.
APART = ("prompt", "negative_prompt", "seed")


@dataclass
class Batch:
    """bundle      id
    first       number of its first picture in the run
    streams, begun   of each picture
    texts       [1 or B, T, W] of the negative prompt (None where no row is guided), of the prompt
    given       names and digests of the pictures that the run was given
    """

    bundle: str
    work: Work
    first: int
    streams: Sequence[Streams]
    begun: Sequence[Beginning]
    texts: tuple[Floats | None, Floats]
    given: Mapping[str, str]
    plan: Plan
    guidance: Guidance = field(init=False)
    predict: Predict = field(init=False)
    blend: Blend | None = field(init=False)
    settle: Settle | None = field(init=False)

    def start(self, open_session: Open, resume: Saved | None) -> Array | State:
        """What the loop starts from. Raises RequestError when `resume` is of another run."""
        request = self.work.request
        assert request.rescale is not None
        uncond, cond = (
            None if text is None else np.repeat(text, len(self.begun) // len(text), axis=0)
            for text in self.texts
        )
        assert cond is not None
        self.guidance = Guidance(
            open_session, uncond, cond, _conditions(self.begun),
            halves=request.halves, rescale=request.rescale,
        )  # fmt: skip
        tile = self.plan.unet_tile
        self.predict = self.guidance if tile is None else Tiled(self.guidance.part, tile)
        self.blend = _blend(self.work, self.begun)
        self.settle = None if self.blend is None else partial(_settled, self.blend)
        x = np.stack([b.x for b in self.begun])
        if resume is None:
            return x
        resume.check(
            bundle=self.bundle,
            request=self._request(),
            table=self.work.table,
            shape=x.shape,
            conditions=self.given,
        )
        for own, snapshot in zip(self.streams, resume.noise, strict=True):
            own.other.restore(snapshot)
        self.guidance.restore(resume.state.rows, resume.features)
        return resume.state

    def job(self, start: Array | State) -> Job | None:
        """This batch for a device that runs tables; None where it needs what a table cannot say:
        tiles, rescaled guidance, or features that only the host has."""
        table, rescale = self.work.table, self.work.request.rescale
        state = start if isinstance(start, State) else State.fresh(table, start)
        if self.plan.unet_tile is not None or rescale != 0.0 or needs_features(table, state.rows):
            return None
        sessions = self.guidance.sessions(table, state)
        halves, channels = self.guidance.guided, self.guidance.channels
        return Job(table, state, halves, sessions, channels, self.noise, self.blend)

    def noise(self) -> Array:
        """Unit noise for one row, [B, C, h, w], each picture's from its own stream."""
        return np.stack([own.other.normal(self.work.shape) for own in self.streams])

    def progress(self, step: Step, seconds: float) -> Progress:
        facts, table = self.work.facts, self.work.table
        guess = None
        if facts.preview is not None:
            guess = partial(self._guess, step)
        return Progress(
            self.first, self.work.request.count, step.row.index + 1, len(table), seconds, guess
        )

    def _guess(self, step: Step, index: int = 0) -> Array:
        facts = self.work.facts
        assert facts.preview is not None
        latent = predicted(self.work.table, step)[index]
        return preview(latent, facts.preview, facts.latent.factor)

    def saved(self, step: Step) -> Saved:
        """The run after this step, of this batch alone."""
        return Saved(
            self.bundle,
            self._request(),
            step.state(),
            [own.other.snapshot() for own in self.streams],
            self.given,
            self.guidance.features(),
        )

    def _request(self) -> dict[str, object]:
        request, count = self.work.request, len(self.begun)
        return replace(request.own(self.first), count=count, batch_size=count).to_dict()


def check_alike(requests: Sequence[Request]) -> None:
    """Raises RequestError unless they are one picture each, alike but for prompts and seeds."""
    shapes = [{k: v for k, v in r.to_dict().items() if k not in APART} for r in requests]
    if not requests or any(shape != shapes[0] for shape in shapes):
        found = {k for shape in shapes for k in shape if shape[k] != shapes[0][k]}
        raise RequestError(
            f"these cannot run in one batch: they differ in {', '.join(sorted(found))}"
            if found
            else "no request to run",
            hint=f"only {', '.join(APART)} may differ; run the others on their own",
        )
    if requests[0].count != 1:
        raise RequestError(
            f"requests of {requests[0].count} pictures each cannot run in one batch",
            hint="give a request for each picture, with count 1",
        )


def stacked(
    texts: Sequence[tuple[Floats | None, Floats]],
) -> tuple[Floats | None, Floats]:
    """[1, T, W] of each request -> [B, T, W] of all; as Batch has them.

    raises      RequestError when they do not have the same number of chunks: what is padded would
                be another picture than the same request's alone
    """
    lengths = {text.shape[1] for _, text in texts}
    if len(lengths) > 1:
        raise RequestError(
            f"prompts of {' and '.join(map(str, sorted(lengths)))} tokens cannot run in one batch",
            hint="run those that take more chunks on their own",
        )
    negative = [text for text, _ in texts if text is not None]
    return np.concatenate(negative) if negative else None, np.concatenate([t for _, t in texts])


def _conditions(begun: Sequence[Beginning]) -> Conditions:
    """Those of the pictures of a batch, together. All of a run have the same kinds of them."""

    def together(name: str) -> Array | None:
        each = [getattr(b, name) for b in begun]
        return None if each[0] is None else np.stack(each)

    return Conditions(together("channels"), together("label"), together("unlabelled"))


def _blend(work: Work, begun: Sequence[Beginning]) -> Blend | None:
    """What puts back, after each row and at its level of noise, what is not to be repainted.

    After the last row it is put back clean: a schedule may end a little above no noise at all, but
    the decoder knows nothing of levels.
    """
    kept = [b.kept for b in begun if b.kept is not None]
    if not kept:
        return None
    latent, noise = (np.stack(each) for each in zip(*kept, strict=True))
    mask = inpaint.mask_of(work)
    alphas = np.append(work.table.alphas[1:-1], 1.0).astype(np.float32)
    sigmas = np.append(work.table.sigmas[1:-1], 0.0).astype(np.float32)
    return Blend(mask, latent, noise, alphas, sigmas)


def _settled(blend: Blend, x: Array, row: Row) -> Array:
    still = blend.alphas[row.index] * blend.latent + blend.sigmas[row.index] * blend.noise
    settled: Array = blend.mask * x + (1 - blend.mask) * still
    return settled
