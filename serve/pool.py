"""The queue and the workers behind it.

    pool = Pool(config); pool.start()
    job = pool.submit(Ask("emoji", Request(prompt="a fox")))     raises QueueFull, Stopping
    async for number, event in job.follow(): ...
    pictures = await job.result()
    await pool.close()

One event loop, no locks: everything here runs in it. A job waits in arrival order; requests of one
shape go to a worker together when that pays and enough of them wait. When a worker dies or hangs,
it is ended and a new one started; what it was doing runs again, once.

checked by  tests/http/test_pool.py, tests/http/test_faults.py
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from ..engine.errors import (
    DeadlinePassed,
    NotFound,
    NoWorker,
    QueueFull,
    SdengineError,
    Stopping,
    UnknownName,
    WorkerLost,
)
from ..engine.request import Request
from .asks import Ask, Made, Pictures
from .child import Child, failure
from .config import Config
from .encode import enlarged
from .jobs import Job, Rough
from .metrics import Metrics
from .wire import Message

log = logging.getLogger("sdengine.serve")

ATTEMPTS = 2
TRIES = 2  # starts that fail before what waits is told so
TOGETHER = 4  # requests in one batch where it pays: of one size, so that one shape is compiled
PATIENCE = (0.2, 1.0, 5.0, 30.0)  # seconds before a worker that does not start is tried again


class Pool:
    """failed       why no worker could be started at all, set once; None while that is not so"""

    def __init__(self, config: Config, metrics: Metrics | None = None) -> None:
        self.config = config
        self.metrics = Metrics() if metrics is None else metrics
        self.waiting: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self.kept: OrderedDict[str, Job] = OrderedDict()
        self.children: list[Child] = []
        self.warm: set[Child] = set()
        self.failed: SdengineError | None = None
        self.restarts = 0
        self.stopping = False
        self.picture_s = 1.0
        self._ahead = 0  # pictures that wait: each request that is refused asks
        self._more, self._idle, self._closed = (asyncio.Event() for _ in range(3))
        self._tasks: list[asyncio.Task[None]] = []
        self._busy: dict[str, Child] = {}
        self._stops: set[asyncio.Task[None]] = set()

    # what the APIs use

    def start(self) -> None:
        """Begin to start the workers; `ready` says when one is warm."""
        for number in range(self.config.workers):
            child = Child(self.config.of_worker(number))
            self.children.append(child)
            self._tasks.append(asyncio.create_task(self._serve(child)))

    @property
    def ready(self) -> bool:
        return bool(self.warm) and not self.stopping

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.config.queue

    def wait_s(self) -> float:
        """About how long a request that comes now will wait."""
        return (self._ahead + len(self.running)) * self.picture_s / self.config.workers

    def refuse(self) -> None:
        """Raises QueueFull, Stopping when no request can be taken now."""
        if self.stopping:
            raise Stopping(
                "this server is going down and takes no more requests",
                hint="ask another one, or again in a minute",
            )
        if self.full:
            raise QueueFull(
                f"{len(self.waiting)} requests wait already, as many as may",
                hint="come again after the time in Retry-After",
                after=max(1.0, self.wait_s() / 2),
            )

    def submit(self, ask: Ask, *, keep: bool = False) -> Job:
        """Into the queue.

        keep        the job can be asked for by its id when it is over, for a while
        raises      QueueFull, Stopping, UnknownName
        """
        if ask.model not in self.config.models:
            raise UnknownName("model", ask.model, self.config.models)
        self.refuse()
        hash(ask.shape())  # what cannot be compared fails here, before anything waits
        job = Job(ask, self._ended)
        if keep:
            self.kept[job.id] = job
            self._forget()
        asked = self.config.deadline_s if ask.deadline_s is None else ask.deadline_s
        limit = min(asked, self.config.deadline_s)
        job.timer = asyncio.get_running_loop().call_later(limit, self._expire, job, limit)
        self.waiting.append(job)
        self._count()
        self._more.set()
        return job

    def find(self, id: str) -> Job:
        """A kept job. Raises NotFound."""
        self._forget()
        if id not in self.kept:
            raise NotFound(
                f"there is no job {id[:40]!r}",
                hint=f"finished jobs are kept for {self.config.keep_s:g} s, and only some of them",
            )
        return self.kept[id]

    def cancel(self, job: Job) -> None:
        """It ends now; the worker stops at its next step."""
        if not job.over:
            job.cancel()

    def wish(self, face: str, what: str) -> None:
        """`skip` the part that runs, or `interrupt` the job, of an API's oldest running job."""
        mine = [job for job in self.running.values() if job.ask.face == face]
        for job in mine[:1]:
            job.wish = "skip" if what == "skip" else "interrupt"
            self._stop_if_unwanted(job)

    async def close(self, grace: float | None = None) -> None:
        """Take no more; finish what is there within `grace` seconds and hand the rest back."""
        if self.stopping:
            await self._closed.wait()
            return
        self.stopping = True
        limit = self.config.grace_s if grace is None else grace
        try:
            async with asyncio.timeout(limit):
                await self._drained()
        except TimeoutError:
            for job in [*self.waiting, *self.running.values()]:
                job.fail(Stopping(
                    "this server went down before the request was done",
                    hint="ask another one, or again in a minute",
                ))  # fmt: skip
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.end() for child in self.children))
        self._closed.set()

    # the queue

    async def _drained(self) -> None:
        while self.waiting or self.running:
            self._idle.clear()
            await self._idle.wait()

    def _count(self) -> None:
        self._ahead = sum(len(job.parts) * job.parts[0].count for job in self.waiting)
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(len(self.running))
        if not self.waiting and not self.running:
            self._idle.set()

    def _ended(self, job: Job) -> None:
        """Whatever way it ended."""
        if job.timer is not None:
            job.timer.cancel()
        self.metrics.ended(job)
        if job in self.waiting:
            self.waiting.remove(job)
        self._stop_if_unwanted(job)
        # a kept job is asked for its results alone: megabytes of uploads would stay with it
        job.ask = replace(job.ask, pictures=Pictures())
        self._count()

    def _expire(self, job: Job, limit: float) -> None:
        job.fail(DeadlinePassed(
            f"the request was not done within {limit:g} s",
            hint="ask for fewer pictures or steps, or at a quieter time",
        ))  # fmt: skip

    def _forget(self) -> None:
        """Kept jobs that are too old, then the oldest while all take too much memory."""
        now = monotonic()
        over = [job for job in self.kept.values() if job.ended is not None]
        total = sum(len(made.pixels) for job in over for made in job.made)
        for job in over:
            assert job.ended is not None
            if now - job.ended <= self.config.keep_s and total <= self.config.keep_bytes:
                continue
            total -= sum(len(made.pixels) for made in job.made)
            del self.kept[job.id]

    async def _next(self, child: Child) -> list[Job]:
        """Jobs for a worker. Raises WorkerLost when it dies before there are any."""
        taking = asyncio.create_task(self._take(child))
        dying = asyncio.create_task(child.died())
        try:
            await asyncio.wait({taking, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                raise WorkerLost("a worker died while it had nothing to do", hint="none is needed")
            return taking.result()
        finally:
            taking.cancel()
            dying.cancel()

    async def _take(self, child: Child) -> list[Job]:
        """The oldest job, with others of its shape where a batch of them pays."""
        while not self.waiting:
            self._more.clear()
            await self._more.wait()
        first = self.waiting[0]
        size = self.config.batch
        if size is None:
            size = TOGETHER if child.batch_pays else 1
        shape = first.ask.shape() if size > 1 and first.attempts == 0 else None
        alike = [first]
        if shape is not None:
            alike = [job for job in self.waiting if job.ask.shape() == shape][:size]
        taken = alike if len(alike) == size else [first]
        for job in taken:
            self.waiting.remove(job)
        return taken

    # the workers

    async def _serve(self, child: Child) -> None:
        """One worker's life, and those of the ones that take its place."""
        tries = 0
        while True:
            try:
                await child.start()
            except SdengineError as error:
                log.error("a worker did not start: %s", error.message)
                await child.end()
                if not self.restarts and not self.warm:
                    self.failed = error
                self._hand_back(error, tries)
                await asyncio.sleep(PATIENCE[min(tries, len(PATIENCE) - 1)])
                tries += 1
                continue
            tries = 0
            self.warm.add(child)
            self.metrics.memory.labels("worker").set(child.rss)
            try:
                while not child.crowded:
                    await self._work(child, await self._next(child))
                log.info("a worker holds more than it may: it is started anew")
            except WorkerLost as error:
                log.warning("%s", error.message)
                self.metrics.restarts.inc()
            finally:
                self.warm.discard(child)
                await child.end()
            child.crowded = False
            self.restarts += 1

    def _hand_back(self, error: SdengineError, tries: int) -> None:
        """Nobody waits for workers that do not start: a deleted bundle mends itself seldom."""
        if self.warm or tries < TRIES:
            return
        for job in list(self.waiting):
            job.fail(NoWorker(f"no worker can be started: {error.message}", hint=error.hint))

    async def _work(self, child: Child, jobs: list[Job]) -> None:
        """One job's parts, or one picture of each of several. Raises WorkerLost."""
        for job in jobs:
            self.metrics.waited.observe(monotonic() - job.asked)
            job.start()
            self.running[job.id] = job
            self._busy[job.id] = child
        self._count()
        try:
            while any(not job.over for job in jobs):
                await self._part(child, jobs)
        except WorkerLost as error:
            for job in reversed(jobs):
                self._again(job, error)
            raise
        except Exception as error:  # ours to mend: these jobs fail, the next ones get a new worker
            log.exception("a run ended unexpectedly")
            told = f"unexpected {type(error).__name__}: {error}"[:500]
            for job in jobs:
                job.fail(SdengineError(
                    told, hint="report this; the server's log shows where it happened"
                ))  # fmt: skip
            raise WorkerLost(
                f"a worker is started anew after {told}", hint="none is needed"
            ) from error
        finally:
            for job in jobs:
                self.running.pop(job.id, None)
                self._busy.pop(job.id, None)
            self._count()

    def _again(self, job: Job, error: WorkerLost) -> None:
        if job.over:
            return
        if job.attempts >= ATTEMPTS:
            job.fail(error)
            return
        job.state, job.step, job.rough = "queued", 0, None
        job.tell("queued", again=True)
        self.waiting.appendleft(job)
        self._more.set()

    async def _part(self, child: Child, jobs: list[Job]) -> None:
        """One network run."""
        live = [job for job in jobs if not job.over]
        first = live[0]
        requests = [job.parts[job.part].to_dict() for job in live]
        pictures = first.ask.pictures
        refused: dict[int, SdengineError] = {}
        made: dict[int, list[Made]] = {slot: [] for slot in range(len(live))}
        kind = ""
        async for message in child.run(first.ask.model, requests, pictures.about(), pictures.blobs):
            kind = message.kind
            if kind == "step":
                self._stepped(live, message)
            elif kind == "made":  # added when the part is over: a lost worker's part runs again
                made[message.fields["slot"]].append(_made(message))
            elif kind == "refused":
                refused[message.fields["slot"]] = failure(message)
            elif kind == "failed":
                refused = dict.fromkeys(range(len(live)), failure(message))
            elif kind == "done":
                self._measured(message, sum(request["count"] for request in requests))
                for job in live:
                    job.warnings = list(dict.fromkeys(job.warnings + message.fields["warnings"]))
        for slot, job in enumerate(live):
            if slot in refused:
                job.fail(refused[slot])
            elif not job.over:
                self._onwards(job, made[slot], stopped=kind == "stopped")

    def _onwards(self, job: Job, made: list[Made], *, stopped: bool) -> None:
        """After a part: the next one, or the end."""
        stopped = stopped and not made  # what was whole before somebody else's stop counts
        if stopped and not job.wish:
            return  # somebody else's wish, which came too late for them: the part runs again
        for one in made:
            job.add(one)
        if stopped and job.rough is not None:
            job.add(_unfinished(job))
        if job.wish == "interrupt":
            job.interrupted = True
        job.next_part()
        if job.part == len(job.parts) or job.interrupted:
            job.finish()

    def _stepped(self, live: list[Job], message: Message) -> None:
        fields = message.fields
        for slot, job in enumerate(live):
            rough = None
            if slot < len(message.blobs):
                height, width = fields["rough"][slot]
                rough = Rough(width, height, message.blobs[slot], fields["factor"])
            if not job.over:
                job.stepped(fields["step"], fields["steps"], rough)

    def _measured(self, message: Message, pictures: int) -> None:
        seconds = message.fields["seconds"] / pictures
        self.picture_s += 0.2 * (seconds - self.picture_s)
        self.metrics.ran(message.fields["timings"], pictures)
        self.metrics.memory.labels("worker").set(message.fields["rss"])

    def _stop_if_unwanted(self, job: Job) -> None:
        """Tell its worker, when nobody wants what is in the batch any more."""
        child = self._busy.get(job.id)
        if child is None:
            return
        batch = [self.running[id] for id, other in self._busy.items() if other is child]
        if child.running is not None and all(other.over or other.wish for other in batch):
            task = asyncio.create_task(child.stop(child.running))
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)


def _made(message: Message) -> Made:
    fields: Mapping[str, Any] = message.fields
    request = Request.from_dict(fields["request"])
    return Made(fields["width"], fields["height"], message.blobs[0], request, fields["about"])


def _unfinished(job: Job) -> Made:
    """The rough picture of a part that was interrupted, in its place."""
    assert job.rough is not None
    pictures, asked = job.ask.pictures, job.parts[job.part]
    task = "inpaint" if pictures.mask is not None else "img2img" if pictures.images else "txt2img"
    whole = asked.completed(task if asked.task is None else asked.task, None).own(0)
    image = enlarged(job.rough)
    return Made(image.width, image.height, image.tobytes(), whole, {}, rough=True)
