"""Batches on Ray: what is asked of it, what is made of its failures, and a node that is lost."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdengine import api
from sdengine.cli import app
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    MissingExtra,
    RequestError,
    StorageError,
    UnknownName,
)
from sdengine.serve import batch, lines, plan, ray_batch

Write = Callable[..., Path]


class RayError(Exception):
    """What Ray's own are called."""


class StandIn:
    """Ray as far as it is used, in this process: tasks run when they are waited for."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *nodes: dict[str, float], broken: int = -1) -> None:
        self._nodes, self._broken = nodes, broken
        self.options: dict[str, Any] = {}
        self.models: list[str] = []
        self.most_running, self._running, self.count = 0, 0, 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes] + [
            {"Alive": False, "Resources": {"CPU": 1000.0}}
        ]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for node in self._nodes for name in node}
        return {name: sum(node.get(name, 0) for node in self._nodes) for name in names}

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**asked: Any) -> Any:
            self.options = asked

            def start(*arguments: Any) -> Callable[[], Any]:
                self._running += 1
                self.models.append(arguments[0])
                self.most_running = max(self.most_running, self._running)
                arguments = pickle.loads(pickle.dumps(arguments))
                number, self.count = self.count, self.count + 1

                def result() -> Any:
                    self._running -= 1
                    if number == self._broken:
                        raise RayError("the worker died\nlong story")
                    return pickle.loads(pickle.dumps(function(*arguments)))

                return result

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[-num_returns:], references[:-num_returns]  # the last first

    def get(self, reference: Callable[[], Any]) -> Any:
        return reference()


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def make(*nodes: dict[str, float], **options: Any) -> StandIn:
        made = StandIn(*nodes, **options)
        monkeypatch.setattr(ray_batch, "connect", lambda address: made)
        ray_batch._pipeline.cache_clear()
        return made

    return make


def planned(path: Path, bundle: Path) -> list[plan.Item]:
    return plan.items(lines.read(path).good, open_bundle(bundle).id, {})


def cluster(bundle: Path, **options: Any) -> ray_batch.Cluster:
    known = options.pop("known", open_bundle(bundle).id)
    return ray_batch.Cluster("auto", str(bundle), known, {"backend": "fake"}, **options)


def test_the_pictures_are_those_of_a_batch_here(
    on_ray: Callable[..., StandIn], fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    Image.fromarray(np.full((64, 128, 3), 99, np.uint8)).save(tmp_path / "in.png")
    path = write_lines(
        {"prompt": "fox", "count": 5, "batch_size": 2, "steps": 2},
        {"prompt": "bear", "image": "in.png", "strength": 0.5, "steps": 4},
        "panda",
    )
    wanted = planned(path, fake_bundle)
    ray = on_ray({"CPU": 4.0}, {"CPU": 2.0})
    outcome = batch.run(wanted, tmp_path / "far", cluster(fake_bundle))
    here = batch.Local(lambda preset: api.load(fake_bundle, backend="fake"))
    batch.run(wanted, tmp_path / "here", here)
    assert outcome.made == 7
    for item in wanted:
        far, near = (tmp_path / where / item.name for where in ("far", "here"))
        assert far.read_bytes() == near.read_bytes()
    assert ray.count == 3 + 1 + 1  # pairs of the first line stay together
    assert ray.options["num_cpus"] == 2.0
    assert ray.options["max_retries"] > 0
    assert ray.most_running <= 2 * (3 + 1)


def test_a_picture_that_a_machine_does_not_have_goes_along(
    on_ray: Callable[..., StandIn], fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    picture = tmp_path / "in.png"
    Image.fromarray(np.full((64, 128, 3), 99, np.uint8)).save(picture)
    wanted = planned(write_lines({"image": "in.png", "seed": 3, "steps": 2}), fake_bundle)
    (job,) = plan.jobs(wanted)
    contents = {str(picture): picture.read_bytes()}
    on_ray({"CPU": 1.0})
    arguments = (str(fake_bundle), open_bundle(fake_bundle).id, {"backend": "fake"}, job, contents)
    (there,) = ray_batch.make(*arguments)
    picture.unlink()
    (gone,) = ray_batch.make(*arguments)
    assert isinstance(there, batch.Made)
    assert isinstance(gone, batch.Made)
    pixels = []
    for found in (there, gone):
        (tmp_path / "x.png").write_bytes(found.data)
        with Image.open(tmp_path / "x.png") as image:
            pixels.append(np.asarray(image))
    assert np.array_equal(*pixels)


def test_what_ray_gives_up_on_is_a_failure_of_that_line_alone(
    on_ray: Callable[..., StandIn], fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    wanted = planned(write_lines("fox", "bear", "panda"), fake_bundle)
    on_ray({"CPU": 1.0}, broken=1)
    failures: list[batch.Failed] = []
    outcome = batch.run(
        wanted,
        tmp_path / "out",
        cluster(fake_bundle),
        keep_going=True,
        hooks=batch.Hooks(on_failure=failures.append),
    )
    assert (outcome.made, outcome.failed) == (2, 1)
    assert isinstance(failures[0].error, BackendError)
    assert failures[0].error.message == "line 2: Ray could not do it: the worker died"
    assert "ray status" in failures[0].error.hint


def test_a_given_file_that_vanished_is_a_failure_of_its_line_alone(
    on_ray: Callable[..., StandIn], fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    picture = tmp_path / "in.png"
    Image.fromarray(np.full((64, 128, 3), 99, np.uint8)).save(picture)
    own = {"prompt": "fox", "image": "in.png", "steps": 2}
    alone = planned(write_lines(own), fake_bundle)
    wanted = planned(write_lines(own, "bear"), fake_bundle)
    picture.unlink()
    on_ray({"CPU": 1.0})
    failures: list[batch.Failed] = []
    hooks = batch.Hooks(on_failure=failures.append)
    engine = cluster(fake_bundle)
    outcome = batch.run(wanted, tmp_path / "out", engine, keep_going=True, hooks=hooks)
    assert (outcome.made, outcome.failed) == (1, 1)
    assert failures[0].error.message.startswith(f"line 1: cannot read {picture}: No such file")
    assert "put it back" in failures[0].error.hint
    with pytest.raises(StorageError, match="cannot read"):
        batch.run(alone, tmp_path / "alone", engine)


def test_a_machine_with_another_bundle_is_refused(
    on_ray: Callable[..., StandIn], fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    on_ray({"CPU": 1.0})
    wanted = planned(write_lines("fox"), fake_bundle)
    with pytest.raises(BundleError, match="not another id") as caught:
        batch.run(wanted, tmp_path, cluster(fake_bundle, known="another id"))
    assert "the same path on each machine" in caught.value.hint


def test_the_command_names_the_bundle_as_every_machine_finds_it(
    on_ray: Callable[..., StandIn],
    fake_bundle: Path,
    write_lines: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers have a working folder of their own."""
    ray = on_ray({"CPU": 2.0})
    monkeypatch.chdir(fake_bundle.parent)
    words = ["batch", write_lines("fox", "bear"), "--out", tmp_path / "out", "--ray", "auto"]
    options = ["--model", fake_bundle.name, "--backend", "fake", "--worker-cpus", "1", "--json"]
    result = CliRunner().invoke(app, [*map(str, words), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["made"] == 2
    assert ray.options["num_cpus"] == 1.0
    assert Path(ray.models[0]) == fake_bundle.absolute()


@pytest.mark.parametrize(
    ("nodes", "asked", "found"),
    [
        ([{"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 4.0}], (None, None), (4.0, 0.0)),
        ([{"CPU": 0.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}], (None, None), (4.0, 1.0)),
        ([{"CPU": 16.0, "GPU": 4.0}], (None, 0.0), (16.0, 0.0)),
        ([{"CPU": 8.0}], (2.0, None), (2.0, 0.0)),
    ],
)
def test_a_worker_takes_a_gpu_or_a_node(
    nodes: list[dict[str, float]],
    asked: tuple[float | None, float | None],
    found: tuple[float, float],
) -> None:
    each = ray_batch.resources(StandIn(*nodes), *asked)
    assert (each["num_cpus"], each["num_gpus"]) == found


@pytest.mark.parametrize(("cpus", "gpus"), [(None, 1.0), (9.0, None), (1.0, 2.0)])
def test_what_no_node_has_is_not_waited_for(cpus: float | None, gpus: float | None) -> None:
    with pytest.raises(BackendUnavailable, match="no node of the Ray cluster has") as caught:
        ray_batch.resources(StandIn({"CPU": 8.0}), cpus, gpus)
    assert "--worker-cpus" in caught.value.hint
    assert "8 CPU, 0 GPU" in caught.value.message


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="needs the package ray") as caught:
        ray_batch.connect("auto")
    assert "pip install 'sdengine[ray]'" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [RequestError("what", hint="do"), UnknownName("sampler", "eulr", ["euler", "ddim"])],
)
def test_an_error_comes_back_whole(error: RequestError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))
    assert again.exit_code == 2


@pytest.mark.slow
def test_a_node_is_lost_in_the_middle_and_no_picture_is(
    fake_bundle: Path, write_lines: Write, tmp_path: Path
) -> None:
    """Two Ray nodes on this machine; 30 pictures, a node killed after ten."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'sdengine[ray]'")
    path = write_lines(*[{"prompt": f"fox {k}", "seed": k, "steps": 2} for k in range(30)])
    script = Path(__file__).with_name("ray_cluster.py")
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, script, fake_bundle, path, out, "fake"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["made"], found["failed"], found["wanted"]) == (30, 0, 30)
    assert found["nodes"] == 2, "the head and the node that was left"
    here = batch.Local(lambda preset: api.load(fake_bundle, backend="fake"))
    wanted = plan.items(lines.read(path).good, open_bundle(fake_bundle).id, {"backend": "fake"})
    batch.run(wanted, tmp_path / "here", here)
    for item in wanted:
        assert (out / item.name).read_bytes() == (tmp_path / "here" / item.name).read_bytes()
