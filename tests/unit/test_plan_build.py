"""The builder of engines against a library of our own: what it is told, and what it refuses."""

from __future__ import annotations

import enum
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdengine.backends import plan_build, plans
from sdengine.backends.plan_build import Built, Job, answer, build, check_capability, job_for
from sdengine.engine.errors import BackendError, BackendUnavailable
from sdengine.engine.spec import Graph, TensorSpec

GRAPH = Graph(
    "full",
    Path("unet/full.f16.onnx"),
    "0" * 64,
    (
        TensorSpec("sample", "float32", ("B", 4, "h", "w")),
        TensorSpec("timestep", "float32", ("B",)),
    ),
    (TensorSpec("out", "float32", ("B",)),),
)
STATIC = {"B": (2, 2, 2), "h": (16, 16, 16), "w": (16, 16, 16)}
RANGE = {**STATIC, "B": (1, 2, 8)}


class Capability(enum.Enum):
    NONE = 0
    CURRENT = 1
    SM75 = 75
    SM89 = 89


class Library(ModuleType):
    """Shaped as tensorrt and tensorrt_rtx are; remembers what it was told."""

    __version__ = "1.2.3"

    def __init__(self, *, parses: bool = True, builds: bool = True) -> None:
        super().__init__("library")
        self.said: dict[str, Any] = {}
        library = self

        class ILogger:
            Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal", INFO="info")

            def log(self, severity: Any, message: str) -> None: ...

        class Network:
            num_inputs = 2

            def __init__(self) -> None:
                self.inputs = [SimpleNamespace(name=t.name, shape=None) for t in GRAPH.inputs]

            def get_input(self, index: int) -> Any:
                return self.inputs[index]

        class Config:
            num_compute_capabilities = 0

            def set_compute_capability(self, capability: Any, index: int) -> None:
                library.said["capability"] = capability, index

            def set_flag(self, flag: str) -> None:
                library.said.setdefault("set", []).append(flag)

            def add_optimization_profile(self, profile: Any) -> None:
                library.said["profile"] = profile

            def create_timing_cache(self, raw: bytes) -> Any:
                library.said["timing"] = raw
                return SimpleNamespace(serialize=lambda: b"after")

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
                self.cache = cache

            def get_timing_cache(self) -> Any:
                return self.cache

        class Builder:
            def __init__(self, log: Any) -> None:
                self.log = log

            def create_network(self, flags: int) -> Network:
                library.said["flags"] = flags
                library.said["network"] = Network()
                return library.said["network"]

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Any:
                shapes: dict[str, Any] = {}
                return SimpleNamespace(
                    shapes=shapes, set_shape=lambda name, *s: shapes.update({name: s})
                )

            def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
                self.log.log("info", "chatter")
                self.log.log("error", "no kernel for MatMul")
                return b"a plan" if builds else None

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: Any, log: Any) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                library.said["path"] = path
                return parses

            def get_error(self, index: int) -> str:
                return "node 3: no such operator"

        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser
        self.ComputeCapability = Capability
        self.BuilderFlag = SimpleNamespace(STRIP_PLAN="strip", REFIT_IDENTICAL="same", REFIT="any")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)


def job(dims: Any = STATIC, sm: int | None = 89, **changes: Any) -> Job:
    made = job_for(GRAPH, dims, "tensorrt_rtx", Path("out.engine"), sm)
    return Job(**{**vars(made), **changes})


def test_fixed_sizes_go_into_the_network() -> None:
    library = Library()
    assert bytes(build(library, job())) == b"a plan"
    assert [v.shape for v in library.said["network"].inputs] == [(2, 4, 16, 16), (2,)]
    assert "profile" not in library.said
    assert library.said["capability"] == (Capability.SM89, 0)
    assert library.said["flags"] == 2  # strongly typed
    assert library.said["path"] == "unet/full.f16.onnx"


def test_a_range_of_sizes_is_a_profile() -> None:
    library = Library()
    build(library, job(RANGE))
    assert library.said["profile"].shapes == {
        "sample": ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16)),
        "timestep": ((1,), (2,), (8,)),
    }


def test_weights_are_left_out_when_that_is_asked_for() -> None:
    library = Library()
    build(library, job())
    assert "set" not in library.said
    build(library, job_for(GRAPH, STATIC, "tensorrt", Path("out.engine"), None, strip=True))
    assert library.said["set"] == ["strip", "same"]
    library.BuilderFlag = SimpleNamespace(REFIT="any")
    with pytest.raises(BackendUnavailable, match="strips no weights: it has no STRIP_PLAN") as e:
        build(library, job(strip=True))
    assert "SDENGINE_TRT=strip" in e.value.hint


def test_on_the_machine_with_the_gpu_no_capability_is_named() -> None:
    library = Library()
    del library.NetworkDefinitionCreationFlag  # as where graphs are always strongly typed
    build(library, job(sm=None))
    assert "capability" not in library.said
    assert library.said["flags"] == 0


def test_a_timing_cache_is_read_and_written_again(tmp_path: Path) -> None:
    library, file = Library(), tmp_path / "timing"
    build(library, job(timing=str(file)))
    assert library.said["timing"] == b""
    build(library, job(timing=str(file)))
    assert library.said["timing"] == b"after" == file.read_bytes()


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (Library(parses=False), "cannot read the graph, full.f16.onnx for sm89: node 3: no such"),
        (Library(builds=False), "cannot build it, full.f16.onnx for sm89: no kernel for MatMul"),
    ],
)
def test_what_the_library_refuses_is_quoted(library: Library, words: str) -> None:
    with pytest.raises(BackendError) as caught:
        build(library, job())
    assert words in caught.value.message
    assert "chatter" not in caught.value.message
    assert "--precision" in caught.value.hint


def test_a_gpu_that_is_not_on_the_list() -> None:
    check_capability(Library(), 75)
    with pytest.raises(
        BackendUnavailable, match="does not build for sm90; it does for sm75, sm89"
    ) as caught:
        check_capability(Library(), 90)
    assert "--sm" in caught.value.hint
    assert "onnxruntime" in caught.value.hint


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailable, match="tensorrt-rtx-cu13 is not installed") as caught:
        plan_build.load("tensorrt_rtx")
    assert caught.value.hint == "pip install 'tensorrt-rtx-cu13'"


# The process of its own


def run_main(monkeypatch: pytest.MonkeyPatch, library: Library, asked: Job) -> tuple[int, str]:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(vars(asked))))
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    return plan_build.main(), out.getvalue()


def test_a_process_writes_the_plan_and_says_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(out=str(tmp_path / "deep" / "x.engine"))
    status, out = run_main(monkeypatch, Library(), asked)
    built = answer(asked, status, "a library's own chatter\n" + out, "")
    assert (tmp_path / "deep" / "x.engine").read_bytes() == b"a plan"
    assert built.size == 6
    assert built.version == "1.2.3"
    assert built.peak > 1 << 20 or not Path("/proc/self/status").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.engine"]


def test_what_a_process_met_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(sm=90)
    status, out = run_main(monkeypatch, Library(), asked)
    with pytest.raises(BackendUnavailable, match="does not build for sm90"):
        answer(asked, status, out, "")
    asked = job()
    status, out = run_main(monkeypatch, Library(builds=False), asked)
    with pytest.raises(BackendError, match="no kernel for MatMul"):
        answer(asked, status, out, "")


def test_a_process_that_was_killed_or_crashed() -> None:
    with pytest.raises(BackendError, match="memory ran out") as caught:
        answer(job(), -9, "", "")
    assert "--jobs 1" in caught.value.hint
    with pytest.raises(BackendError, match=r"ended with status -11.*: Segmentation"):
        answer(job(), -11, "chatter", "Segmentation fault\n")


def test_the_child_that_is_really_started_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, the true module: its library is one that no machine has."""
    monkeypatch.setitem(plan_build.PACKAGES, "no_such_library", "no-such-package")
    asked = Job("no_such_library", "x.onnx", str(tmp_path / "x"), {}, None)
    with pytest.raises(BackendError, match="KeyError: 'no_such_library'"):
        plan_build.build_apart(asked)


def test_the_two_libraries_are_those_of_the_targets() -> None:
    assert set(plans.LIBRARIES.values()) == set(plan_build.PACKAGES)
    assert Built(1.0, 2, 3, "4").version == "4"
