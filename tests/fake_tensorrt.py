"""TensorRT's runtime as far as backends/cuda/engines.py calls it, on a device of tests/fake_cuda.

A plan is JSON that names an ONNX graph and its sizes; a context runs it with ONNX Runtime on the
memory whose addresses it was given, when the device comes to that piece of work.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np

from .fake_cuda import FakeDevice, view

SCRATCH = {"unet": 9000, "vae_decoder": 20000}
_SESSIONS: dict[str, object] = {}


def plan_of(library, graph, dims, facts, strip=False) -> bytes:
    """What a build gives; a `Build` of backends/tensorrt.py."""
    tensors = {
        kind: [[t.name, t.dtype, list(t.shape)] for t in getattr(graph, kind)]
        for kind in ("inputs", "outputs")
    }
    plan = {"onnx": str(graph.path), "sm": facts.sm, "library": library, **tensors}
    plan["stripped"] = strip
    return json.dumps({**plan, "dims": {k: list(v) for k, v in dims.items()}}).encode()


def library(device: FakeDevice, version: str = "11.4.0", name: str = "tensorrt"):
    """The module. done: what was opened and refitted; lost: weights that a graph's file lacks;
    refits: whether the library agrees to it."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            try:
                engine = Engine(device, json.loads(plan))
                if engine.stripped:
                    made.done.append(("open", engine.graph))
                return engine
            except ValueError:
                self.logger.log(1, "Serialization assertion header.magicTag failed.\n")
            except LookupError as error:
                self.logger.log(1, f"{error.args[0]}\n")
            self.logger.log(1, "Cuda Runtime: something that follows from it")
            return None

    class Refitter:
        def __init__(self, engine, logger):
            self.engine, self.logger, self.given = engine, logger, None

        def get_missing_weights(self):
            return list(made.lost) if self.given is not None else ["all"]

        def refit_cuda_engine(self):
            assert self.given == self.engine.plan["onnx"], "its own weights"
            if not made.refits:
                self.logger.log(1, "weights of another size")
                return False
            made.done.append(("refit", self.engine.graph))
            self.engine.stripped = False
            return True

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter, logger):
            self.refitter = refitter

        def refit_from_file(self, path):
            made.done.append(("read weights", path))
            self.refitter.given = path
            return not made.lost

    made = SimpleNamespace(
        done=[],
        lost=[],
        refits=True,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        __name__=name,
        __version__=version,
        ILogger=ILogger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user", STATIC="static"),
    )
    return made


class Engine:
    def __init__(self, device: FakeDevice, plan: dict) -> None:
        if plan["sm"] != device.facts().sm:
            raise LookupError(f"the engine is of compute capability {plan['sm'] / 10}")
        self.device, self.plan = device, plan
        self.contexts, self.stripped = 0, plan.get("stripped", False)
        self.graph = plan["onnx"].rsplit("/", 1)[-1].removesuffix(".onnx")
        self.device_memory_size_v2 = next(
            (size for part, size in SCRATCH.items() if f"/{part}/" in plan["onnx"]), 4000
        )

    def create_execution_context(self, strategy):
        assert strategy == "user", "scratch memory is shared"
        self.contexts += 1
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at: dict[str, int] = {}
        self.scratch = (0, 0)

    def set_input_shape(self, name, shape) -> bool:
        dims = self.engine.plan["dims"]
        (wanted,) = [s for n, _, s in self.engine.plan["inputs"] if n == name]
        if len(shape) != len(wanted):
            return False
        for size, dim in zip(shape, wanted, strict=True):
            low, _, high = dims[dim] if isinstance(dim, str) else (dim, dim, dim)
            if not low <= size <= high:
                return False
        self.shapes[name] = tuple(shape)
        return True

    def _sizes(self) -> dict[str, int]:
        return {
            dim: size
            for name, _, shape in self.engine.plan["inputs"]
            for dim, size in zip(shape, self.shapes.get(name, ()), strict=False)
            if isinstance(dim, str)
        }

    def get_tensor_shape(self, name):
        (shape,) = [s for n, _, s in self.engine.plan["outputs"] if n == name]
        sizes = self._sizes()
        sizes |= {big: 8 * sizes[low] for big, low in (("H", "h"), ("W", "w")) if low in sizes}
        return tuple(sizes[d] if isinstance(d, str) else d for d in shape)

    def set_tensor_address(self, name, address) -> bool:
        self.at[name] = address
        return True

    def set_device_memory(self, address, size) -> None:
        self.scratch = (address, size)

    def execute_async_v3(self, stream) -> bool:
        engine, plan = self.engine, self.engine.plan
        missing = [n for n, _, _ in plan["inputs"] if n not in self.at or n not in self.shapes]
        if missing or engine.stripped or self.scratch[1] < engine.device_memory_size_v2:
            return False
        at, shapes = dict(self.at), dict(self.shapes)
        outputs = [(n, self.get_tensor_shape(n), t) for n, t, _ in plan["outputs"]]

        def work() -> None:
            feeds = {n: view(at[n], shapes[n], t).copy() for n, t, _ in plan["inputs"]}
            assert not any(np.isnan(v).any() for v in feeds.values() if v.dtype.kind == "f")
            results = _session(plan["onnx"]).run([n for n, _, _ in outputs], feeds)
            for (name, shape, dtype), value in zip(outputs, results, strict=True):
                view(at[name], shape, dtype)[...] = value

        engine.device.enqueue(("engine", plan["onnx"].rsplit("/", 1)[-1]), work)
        return True


def _session(path: str):
    import onnxruntime

    if path not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        _SESSIONS[path] = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    return _SESSIONS[path]
