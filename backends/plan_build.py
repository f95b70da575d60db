"""Builds one engine of TensorRT or TensorRT-RTX: a strongly typed ONNX graph in, a plan out.

Both libraries have the same builder: it is handed in as a module. TensorRT builds for the GPU that
is there; TensorRT-RTX for any of its list, on a machine without one. A build that failed poisons
later ones of the same process (1.7.1), and none gives its memory back, so each has a process of its
own: `build_apart` starts this module, which reads a job as JSON and answers with one line of JSON.

checked by  tests/unit/test_plan_build.py (a library of our own), tests/contract/test_trt_rtx.py
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import BackendError, BackendUnavailable, SdengineError
from ..engine.spec import Graph
from .plans import Span

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
TAIL = 4  # messages of the library that an error quotes
SLOWEST_S = 3 * 3600


@dataclass(frozen=True)
class Job:
    """One build.

    library     `tensorrt` or `tensorrt_rtx`
    onnx, out   the graph, and where the plan goes
    shapes      input -> its least, best and largest shape
    sm          compute capability to build for; None: of the GPU that is there
    timing      file of TensorRT's timing cache, read and written again; None: none is kept
    strip       leave the weights out: the plan is small, and must be refitted with the same ones
    """

    library: str
    onnx: str
    out: str
    shapes: Mapping[str, Sequence[Sequence[int]]]
    sm: int | None
    timing: str | None = None
    strip: bool = False


@dataclass(frozen=True)
class Built:
    """seconds, size and peak memory (bytes) of a build, and the library's version"""

    seconds: float
    size: int
    peak: int
    version: str


def job_for(
    graph: Graph,
    dims: Mapping[str, Span],
    library: str,
    out: Path,
    sm: int | None,
    strip: bool = False,
) -> Job:
    """dims: for each named dimension of the graph's inputs (plans.spans)"""
    shapes = {
        t.name: [[dims[d][i] if isinstance(d, str) else d for d in t.shape] for i in range(3)]
        for t in graph.inputs
    }
    return Job(library, str(graph.path), str(out), shapes, sm, strip=strip)


def load(library: str) -> Any:
    """The module. Raises BackendUnavailable with the command that installs it."""
    package = PACKAGES[library]
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the package {package} is not installed (no module {error.name})",
            hint=f"pip install '{package}'",
        ) from error
    except Exception as error:
        raise BackendUnavailable(
            f"{library} cannot be imported: {error}", hint=f"pip install -U '{package}'"
        ) from error


def capabilities(trt: Any) -> tuple[int, ...]:
    """The compute capabilities that a builder takes by name; none of TensorRT, which builds for
    the GPU that is there."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return tuple(sorted(int(n[2:]) for n in names if n.startswith("SM") and n[2:].isdigit()))


def check_capability(trt: Any, sm: int) -> None:
    """Raises BackendUnavailable for a GPU that the library does not build for."""
    known = capabilities(trt)
    if sm not in known:
        raise BackendUnavailable(
            f"TensorRT-RTX {trt.__version__} does not build for sm{sm}; it does for "
            f"{', '.join(f'sm{n}' for n in known)}",
            hint="choose from this list with --sm; for another GPU use TensorRT on the machine "
            "that has it, or the backends onnxruntime and torch: `sdengine doctor`",
        )


def build(trt: Any, job: Job) -> memoryview:
    """The plan, in the library's own memory. Raises BackendError with what the library said.

    trt     the module: tensorrt or tensorrt_rtx
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job.onnx):
        said = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refused(job, "cannot read the graph", said)
    config = builder.create_builder_config()
    _set_shapes(builder, network, config, job.shapes)
    if job.sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.sm}"), 0)
    if job.strip:
        _strip(trt, config)
    cache = _timing_cache(config, job.timing)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(job, "cannot build it", log.said)
    if cache is not None and job.timing is not None:
        _replace(Path(job.timing), bytes(config.get_timing_cache().serialize()))
    return memoryview(plan)


def build_apart(job: Job) -> Built:
    """Build in a process of its own; the plan lies at `job.out` afterwards, or nothing does.

    raises      BackendError, BackendUnavailable: what the process met, or how it ended
    """
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        timeout=SLOWEST_S,
        check=False,
    )
    return answer(job, child.returncode, child.stdout, child.stderr)


def answer(job: Job, status: int, out: str, err: str) -> Built:
    """What a build's process said. Raises as `build_apart` does."""
    try:
        said = json.loads(out.strip().rpartition("\n")[2])
    except ValueError:
        said = {}
    if status == 0 and "size" in said:
        return Built(**said)
    if "message" in said:
        kind = BackendUnavailable if said["kind"] == "BackendUnavailable" else BackendError
        raise kind(said["message"], hint=said["hint"])
    if status == -9:
        raise BackendError(
            f"the build of {Path(job.onnx).name} was killed: most likely memory ran out",
            hint="close other programs, or build one engine at a time: --jobs 1",
        )
    raise _refused(job, f"ended with status {status}", err.strip().splitlines())


def main() -> int:
    """A job on stdin; a line of JSON on stdout."""
    job = Job(**json.load(sys.stdin))
    begin = time.monotonic()
    try:
        trt = load(job.library)
        if job.sm is not None:
            check_capability(trt, job.sm)
        plan = build(trt, job)
        _replace(Path(job.out), plan)
    except SdengineError as error:
        said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        sys.stdout.write("\n" + json.dumps(said) + "\n")
        return 1
    built = Built(time.monotonic() - begin, plan.nbytes, peak_memory(), str(trt.__version__))
    sys.stdout.write("\n" + json.dumps(asdict(built)) + "\n")
    return 0


def peak_memory() -> int:
    """Bytes that this process held at most; 0 where the system does not tell. (getrusage counts
    what the parent held when it forked.)"""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else 0


def _log(trt: Any) -> Any:
    """A logger of the library's own kind that keeps warnings and errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.said.append(message)

    return Log()


def _flags(trt: Any) -> int:
    """Types come from the graph: TensorRT 10 is told so by a flag, later ones know nothing else."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    strongly = getattr(flags, "STRONGLY_TYPED", None)
    return 0 if strongly is None else 1 << int(strongly)


def _set_shapes(
    builder: Any, network: Any, config: Any, shapes: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    """Fixed sizes go into the network; where one is a range, all go into a profile."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if all(list(least) == list(most) for least, _, most in shapes.values()):
        for value in inputs:
            value.shape = tuple(shapes[value.name][1])
        return
    profile = builder.create_optimization_profile()
    for value in inputs:
        profile.set_shape(value.name, *(tuple(s) for s in shapes[value.name]))
    config.add_optimization_profile(profile)


def _strip(trt: Any, config: Any) -> None:
    """Not plain REFIT: with it TensorRT 11.3 may drop a bias, as its release notes say.

    raises      BackendUnavailable: a library that strips nothing
    """
    for name in ("STRIP_PLAN", "REFIT_IDENTICAL"):
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise BackendUnavailable(
                f"{trt.__name__} {trt.__version__} strips no weights: it has no {name}",
                hint="use TensorRT 10.8 or newer, or leave SDENGINE_TRT=strip out",
            )
        config.set_flag(flag)


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(content)
    beside.replace(path)


def _refused(job: Job, what: str, said: Sequence[str]) -> BackendError:
    lines = [line.strip() for line in said if line.strip()][-TAIL:]
    where = "for this GPU" if job.sm is None else f"for sm{job.sm}"
    quoted = "; ".join(lines) if lines else "it gave no reason"
    return BackendError(
        f"{job.library} {what}, {Path(job.onnx).name} {where}: {quoted}",
        hint="another precision (--precision) or GPU (--sm) may do; `sdengine inspect BUNDLE "
        "--verify` tells whether the bundle is whole",
    )


if __name__ == "__main__":
    sys.exit(main())
