"""A run's table in device memory, and its rows as work on one stream.

A row is: `feed` puts x and the time into the inputs of its networks; the networks run; `advance`
combines the halves, keeps the output and computes the next x; `next_row` counts. All of that stays
the same from row to row, and the row's number is on the device: from its second time on, a kind of
row is captured as a graph and replayed, one call of the driver.

checked by  tests/unit/test_cuda_board.py (the kernels themselves, compiled for the processor)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ...engine.ports import Array, Half, Job
from ...engine.spec import ComponentSpec
from ...engine.table import Row
from ..denoise import Rings, halves_of, slots_of
from .device import Buffer, Lane

FLOAT = 4
NEVER = 2**31 - 1
STAGED = 16  # rows of noise that the host may be ahead of the device
RUN = (
    "count", "picture", "stride", "depth", "slots", "row", "bad", "weights", "fresh", "guidance",
    "times", "xs", "outs", "noise", "mask", "latent", "still", "alphas", "sigmas",
)  # fmt: skip
CALL = ("sample0", "sample1", "times0", "times1", "copies0", "copies1", "uncond", "cond")


class Runner(Protocol):
    """A network with its text held, as a board drives it: by addresses, on the board's lane."""

    spec: ComponentSpec

    def place(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have memory for inputs of these shapes, and for the outputs that follow."""
        ...

    def address(self, name: str) -> int:
        """Of an input or an output."""
        ...

    def point(self, name: str, address: int) -> None:
        """Read an input there instead."""
        ...

    def enqueue(self, lane: Lane) -> None: ...
    def capturable(self, lane: Lane) -> bool: ...


class TableBoard:
    """runners     as job.sessions
    graphs      whether rows are captured
    """

    def __init__(
        self,
        lane: Lane,
        job: Job,
        runners: Mapping[tuple[Half, str], Runner],
        *,
        graphs: bool = True,
    ) -> None:
        self._lane, self._job, self._runners, self._graphs = lane, job, runners, graphs
        self.slots = slots_of(job.table)
        self._held: list[Buffer] = []
        self._calls: dict[tuple[tuple[Half, ...], str], int] = {}
        self._deep: dict[Half, Runner] = {}
        self._seen: dict[tuple[object, ...], int | None] = {}
        self._staged: deque[tuple[Array, int]] = deque()
        try:
            self._run = self._block(RUN, self._fields())
            self._place()
        except BaseException:
            self.close()
            raise

    def noise(self, values: Array) -> None:
        device = self._lane.device
        if len(self._staged) == STAGED:  # far ahead: take the oldest, once it was copied
            staged, event = self._staged.popleft()
            device.wait_mark(event)
        else:
            staged = device.pinned(values.shape, np.float32)
        np.copyto(staged, values)
        device.write(self._noise.address, staged, self._lane.stream)
        self._staged.append((staged, device.mark(self._lane.stream)))

    def row(self, row: Row) -> None:
        halves, device = halves_of(self._job, row), self._lane.device
        fed = self._features(halves, row.graph)
        # The arena is part of what a graph has in it: one that grew makes old graphs worthless.
        kind = (halves, row.graph, *fed, self._lane.arena)
        graph = self._seen.get(kind)
        if graph is not None:
            device.replay(graph, self._lane.stream)
        elif kind in self._seen and self._capturable(halves, row.graph):
            with device.capturing(self._lane.stream) as captured:
                self._enqueue(halves, row.graph)
            self._seen[kind] = graph = captured()
            device.replay(graph, self._lane.stream)
        else:
            self._enqueue(halves, row.graph)
            self._seen[(*kind[:-1], self._lane.arena)] = None
        if row.graph.startswith("deep"):
            self._deep = {half: self._runners[half, row.graph] for half in halves}

    def rings(self) -> Rings:
        count = self._job.start.x.size
        shape = (2 * self.slots * count + 1,)
        # xs, outs and the flag lie side by side: one transfer
        both = self._lane.to_host(self._rings.address, shape, np.float32)
        bad = int(both[-1:].view(np.int32)[0])
        xs, outs = both[:-1].reshape(2, self.slots, count)
        return Rings(xs, outs, None if bad == NEVER else bad)

    def close(self) -> None:
        """Waits: what was enqueued writes into this memory."""
        device = self._lane.device
        try:
            device.wait(self._lane.stream)
        finally:
            for graph in self._seen.values():
                if graph is not None:
                    device.drop(graph)
            for _, event in self._staged:
                device.wait_mark(event)
            for buffer in self._held:
                buffer.free()
            self._seen, self._held = {}, []
            self._staged.clear()

    def _enqueue(self, halves: tuple[Half, ...], graph: str) -> None:
        lane, count = self._lane, self._job.start.x.size
        launch, run, call = lane.device.launch, self._run, self._calls[halves, graph]
        launch("feed", count, run, call, lane.stream)
        for half in halves:
            self._runners[half, graph].enqueue(lane)
        launch("advance", count, run, call, lane.stream)
        launch("next_row", 1, run, call, lane.stream)

    def _capturable(self, halves: tuple[Half, ...], graph: str) -> bool:
        return self._graphs and all(
            self._runners[half, graph].capturable(self._lane) for half in halves
        )

    def _features(self, halves: tuple[Half, ...], graph: str) -> tuple[int, ...]:
        """Let shallow networks read where the last deep ones wrote: nothing is copied."""
        if not graph.startswith("shallow"):
            return ()
        found = []
        for half in halves:
            runner = self._runners[half, graph]
            name = runner.spec.inputs[-1].name
            if half in self._deep:
                at = self._deep[half].address(name)
            else:  # the conditional half of what ran together: the second of two
                at = self._deep["both"].address(name) + self._bytes(runner, name)
            runner.point(name, at)
            found.append(at)
        return tuple(found)

    def _bytes(self, runner: Runner, name: str) -> int:
        return FLOAT * int(np.prod(self._shapes(runner, 1)[name]))

    def _shapes(self, runner: Runner, copies: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs that are not held."""
        batch, _, h, w = self._job.start.x.shape
        shapes = {}
        for tensor in runner.spec.inputs:
            sizes = {"B": copies * batch, "h": h, "w": w}
            if tensor.name in ("sample", "timestep") or tensor.name.startswith("features"):
                shapes[tensor.name] = tensor.resolve(sizes)
        return shapes

    def _fields(self) -> dict[str, int]:
        """The run's block; its memory, filled."""
        job, table, x = self._job, self._job.table, self._job.start.x
        done, depth, slots = job.start.rows, table.depth, self.slots
        rings = np.zeros((2, slots, x.size), np.float32)
        for past in range(max(0, done - depth), done):
            rings[0, past % slots] = job.start.history[past % depth]
            rings[1, past % slots] = job.start.history[depth + past % depth]
        rings[0, done % slots] = x.ravel()
        flag = np.array([NEVER], np.int32).view(np.float32)
        self._rings = self._put(np.concatenate([rings.ravel(), flag]))
        self._noise = self._keep(Buffer(self._lane.device, x.nbytes))
        joined = 0 if job.channels is None else job.channels[0].size
        xs = self._rings.address
        columns = {
            "weights": table.weights(),
            "fresh": table.n,
            "guidance": table.guidance,
            "times": table.t,
        }
        fields = {name: self._put(v.astype(np.float32)).address for name, v in columns.items()}
        fields |= {
            "count": x.size,
            "picture": x[0].size,
            "stride": x[0].size + joined,
            "depth": depth,
            "slots": slots,
            "row": self._put(np.array([done], np.int32)).address,
            "xs": xs,
            "outs": xs + FLOAT * slots * x.size,
            "bad": xs + FLOAT * 2 * slots * x.size,
            "noise": self._noise.address,
        }
        if job.blend is not None:
            whole = {
                "mask": np.broadcast_to(job.blend.mask, x.shape),
                "latent": job.blend.latent,
                "still": job.blend.noise,
                "alphas": job.blend.alphas,
                "sigmas": job.blend.sigmas,
            }
            fields |= {n: self._put(v.astype(np.float32)).address for n, v in whole.items()}
        return fields

    def _place(self) -> None:
        """Memory for the networks, what is joined behind x in it, and a block for each call."""
        job, batch = self._job, len(self._job.start.x)
        for (half, _), runner in self._runners.items():
            copies = 2 if half == "both" else 1
            shapes = self._shapes(runner, copies)
            runner.place(shapes)
            if job.channels is not None:
                sample = np.zeros(shapes["sample"], np.float32)
                sample[:, job.start.x.shape[1] :] = np.tile(job.channels, (copies, 1, 1, 1))
                staged = self._put(sample)
                lane = self._lane
                lane.device.copy(
                    runner.address("sample"), staged.address, sample.nbytes, lane.stream
                )
        for row in job.table.rows()[job.start.rows :]:
            halves = halves_of(job, row)
            if (halves, row.graph) in self._calls:
                continue
            fields: dict[str, int] = {}
            for k, half in enumerate(halves):
                runner = self._runners[half, row.graph]
                fields[f"sample{k}"] = runner.address("sample")
                fields[f"times{k}"] = runner.address("timestep")
                fields[f"copies{k}"] = 2 if half == "both" else 1
                fields["cond"] = runner.address(runner.spec.outputs[0].name)
                if half == "uncond":
                    fields["uncond"] = fields["cond"]
                elif half == "both":
                    fields["uncond"] = fields["cond"]
                    fields["cond"] += FLOAT * batch * job.start.x[0].size
            self._calls[halves, row.graph] = self._block(CALL, fields)

    def _block(self, names: tuple[str, ...], fields: Mapping[str, int]) -> int:
        """A struct of row.cu."""
        return self._put(np.array([fields.get(n, 0) for n in names], np.int64)).address

    def _put(self, values: Array) -> Buffer:
        return self._keep(self._lane.to_device(np.ascontiguousarray(values)))

    def _keep(self, buffer: Buffer) -> Buffer:
        self._held.append(buffer)
        return buffer
