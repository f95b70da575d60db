"""TensorRT-RTX engines of the embedded model, built for real by the library, without a GPU.

Where the environment says CI=true, a library that is missing is a failure; elsewhere a skip.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from sdengine.backends import plan_build, plans
from sdengine.backends.plan_build import Job, build_apart, capabilities, job_for
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendError, BackendUnavailable
from sdengine.engine.spec import Component, is_band
from sdengine.export.builds import Planned, need, run_builds
from sdengine.export.graph.quantize import E4M3, Grid, layers
from sdengine.export.nvidia import _weight_bytes
from sdengine.export.quantize import Choice
from sdengine.export.shapes import Shapes, profiles
from sdengine.export.typed import write_typed

pytestmark = pytest.mark.export

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji"
ENOUGH = 16 << 30  # the builds go one at a time whatever memory there is


@pytest.fixture(scope="module")
def rtx() -> Any:
    try:
        return plan_build.load("tensorrt_rtx")
    except BackendUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI builds TensorRT-RTX engines: {error.message}; {error.hint}")
        pytest.skip(f"{error.message}; {error.hint}")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Component]]:
    """The typed networks in float16. `deep` is left out: `full` with three outputs more."""
    folder = tmp_path_factory.mktemp("rtx") / "emoji"
    shutil.copytree(EMBEDDED, folder)
    bundle = open_bundle(folder)
    yield {
        n: write_typed(c, bundle.path, folder, "f16").component
        for n, c in bundle.components.items()
    }
    shutil.rmtree(folder)


def test_every_network_of_the_embedded_model_builds(
    rtx: Any, networks: dict[str, Component], tmp_path: Path
) -> None:
    bundle = open_bundle(EMBEDDED)
    planned = []
    for name, network in networks.items():
        for graph in network.graphs.values():
            if graph.name == "deep" or is_band(graph.name):  # pieces are built where they run
                continue
            (dims,) = profiles(Shapes(), bundle, network, graph)
            job = job_for(graph, dims, "tensorrt_rtx", tmp_path / f"{name}.{graph.name}", 89)
            planned.append(Planned(job, f"{name}/{graph.name}", need(_weight_bytes(graph.path))))
    said: list[str] = []
    done = run_builds(planned, ENOUGH, 1, lambda text, share: said.append(text))
    assert len(done) == len(planned) == len(said) == 8
    for plan in planned:
        built = done[plan.label]
        assert built.version == rtx.__version__
        assert Path(plan.job.out).stat().st_size == built.size
        assert built.size > 0.9 * _weight_bytes(Path(plan.job.onnx)), plan.label
        assert 50 << 20 < built.peak < plan.need + (400 << 20), plan.label


@pytest.mark.parametrize("sm", [75, 120])
def test_other_gpus_and_ranges(
    rtx: Any, networks: dict[str, Component], tmp_path: Path, sm: int
) -> None:
    """sm75 takes no product in float32: the typed graph has none."""
    graph = networks["unet"].graphs["shallow0"]
    dims = {"B": (1, 2, 4), "h": (8, 16, 16), "w": (8, 16, 16), "T": (77, 77, 77)}
    dims = {d: n for d, n in dims.items() if d in plans.spans(graph, dims)}
    out = tmp_path / "shallow0.engine"
    built = build_apart(job_for(graph, dims, "tensorrt_rtx", out, sm))
    assert built.size == out.stat().st_size > 100_000


def test_the_library_takes_fp8_from_ada_on(rtx: Any, tmp_path: Path) -> None:
    """Grids need no calibration to build; an older GPU is refused by the library, too."""
    folder = tmp_path / "emoji"
    shutil.copytree(EMBEDDED, folder)
    bundle = open_bundle(folder)
    unet = bundle.components["unet"]
    unet = replace(unet, graphs={"shallow0": unet.graphs["shallow0"]})
    weighted = [la for la in layers(ir.load(unet.graphs["shallow0"].path)) if la.weight]
    rounded = frozenset(la.name for la in weighted if "transformer" in la.name)
    grids = {n: (Grid(0.01, None, E4M3),) for n in rounded}
    choice = Choice(grids, floats=frozenset(la.name for la in weighted) - rounded)
    graph = write_typed(unet, bundle.path, folder, "fp8", choice).component.graphs["shallow0"]
    dims = plans.spans(graph, {"B": 2, "h": 16, "w": 16, "T": 77})
    out = tmp_path / "shallow0.engine"
    assert build_apart(job_for(graph, dims, "tensorrt_rtx", out, 89)).size > 100_000
    with pytest.raises(BackendError, match="fp8_e4m3"):
        build_apart(job_for(graph, dims, "tensorrt_rtx", out, 86))
    with pytest.raises(BackendUnavailable, match="sm86 has no fp8") as caught:
        plans.check_precision("fp8", 86)
    assert "--precision f16" in caught.value.hint
    plans.check_precision("fp8", plans.LEAST_SM["fp8"])


def test_what_the_library_cannot_read_is_quoted(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    job = Job("tensorrt_rtx", str(tmp_path / "broken.onnx"), str(tmp_path / "out"), {}, 89)
    with pytest.raises(BackendError, match=r"cannot read the graph, broken\.onnx for sm89"):
        build_apart(job)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_the_library_does_not_know(rtx: Any, tmp_path: Path) -> None:
    assert {75, 80, 86, 89, 120} <= set(capabilities(rtx))
    job = Job("tensorrt_rtx", "x.onnx", str(tmp_path / "out"), {}, 90)
    with pytest.raises(BackendUnavailable, match="does not build for sm90; it does for sm75"):
        build_apart(job)
