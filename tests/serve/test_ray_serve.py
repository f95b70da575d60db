"""The server on Ray Serve: what a replica is told, what it refuses, and (slow) a real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sdengine import api
from sdengine.engine.errors import RequestError, StorageError
from sdengine.serve import ray_serve
from sdengine.serve.config import Config

DEPLOY = Path(__file__).parents[2] / "deploy"
EMOJI = {"emoji": api.EMBEDDED["emoji"]}


class StandIn:
    """Ray Serve as far as it is used: it keeps what it is asked for."""

    def __init__(self, model: str = "") -> None:
        self.asked: dict[str, Any] = {}
        self.held: list[str] = []
        self._model = model

    def deployment(self, **asked: Any) -> Any:
        self.asked = asked
        return lambda made: SimpleNamespace(bind=lambda: made)

    def ingress(self, build: Any) -> Any:
        return lambda: build

    def multiplexed(self, **_: Any) -> Any:
        def wrap(function: Any) -> Any:
            async def noted(name: str) -> Any:
                self.held.append(name)
                return await function(name)

            return noted

        return wrap

    def get_multiplexed_model_id(self) -> str:
        return self._model


@pytest.fixture
def on_serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def make(model: str = "") -> StandIn:
        made = StandIn(model)
        monkeypatch.setitem(sys.modules, "ray.serve", made)
        return made

    return make


def asked(app: Any, path: str) -> tuple[int, bytes]:
    """Status and body of a GET, of an ASGI application in this process."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "path": path, "method": "GET", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


async def inner(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_a_replica_keeps_no_jobs_and_passes_the_rest_on(on_serve: Callable[..., StandIn]) -> None:
    on_serve()
    app = ray_serve.routed(inner, Config(EMOJI))
    assert asked(app, "/v1/images/generations") == (200, b"/v1/images/generations")
    assert asked(app, "/jobsite")[0] == 200
    for path in ("/jobs", "/jobs/17"):
        status, body = asked(app, path)
        assert status == 404
        assert b"several" in body
        assert b"without --ray" in body


def test_a_replica_says_which_models_it_has_used(on_serve: Callable[..., StandIn]) -> None:
    for name, held in (("emoji", ["emoji"]), ("another", []), ("", [])):
        serve = on_serve(name)
        asked(ray_serve.routed(inner, Config(EMOJI)), "/v1/models")
        assert serve.held == held


def test_the_application_of_the_manifest(on_serve: Callable[..., StandIn], tmp_path: Path) -> None:
    manifest = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = served["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, getattr(ray_serve, name)) == (ray_serve.__name__, ray_serve.application)
    token = tmp_path / "token"
    token.write_text("a-long-secret\n")
    token.chmod(0o600)
    serve = on_serve()
    ray_serve.application({**application["args"], "token_file": str(token)})
    assert serve.asked["ray_actor_options"] == {"num_cpus": 4.0, "num_gpus": 0.0}
    assert serve.asked["autoscaling_config"]["max_replicas"] == 8
    assert serve.asked["max_ongoing_requests"] == Config({}).queue
    workers = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers[0]["template"]["spec"]["containers"]
    assert float(container["resources"]["limits"]["cpu"]) >= 4, "or no replica ever fits"
    assert workers[0]["maxReplicas"] == 8
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(application["args"]["token_file"]).parent) in mounts


def test_arguments_that_make_no_sense(on_serve: Callable[..., StandIn]) -> None:
    on_serve()
    with pytest.raises(RequestError, match="unknown arguments of the application: gpu") as caught:
        ray_serve.application({"models": {"emoji": "emoji"}, "gpu": 1})
    assert "gpus" in caught.value.hint
    with pytest.raises(RequestError, match="there is no token") as caught:
        ray_serve.application({"models": {"emoji": "emoji"}})
    assert "args.token_file" in caught.value.hint
    with pytest.raises(StorageError):
        ray_serve.application({"models": {"emoji": "emoji"}, "token_file": "/no/such/file"})


def test_the_web_page_is_refused() -> None:
    with pytest.raises(RequestError, match="keeps a conversation") as caught:
        ray_serve.run(Config(EMOJI, ui=True), "local")
    assert "sdengine serve --ui" in caught.value.hint


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in (0.0, 7.0, 4.0)]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert ray_serve._room(ray, {"num_cpus": 4.0, "num_gpus": 0.0}) == 2
    assert ray_serve._room(ray, {"num_cpus": 2.0, "num_gpus": 0.0}) == 5
    assert ray_serve._room(ray, {"num_cpus": 64.0, "num_gpus": 0.0}) == 1


@pytest.mark.slow
def test_two_replicas_answer_as_one_server(fake_bundle: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'sdengine[ray]'")
    script = Path(__file__).with_name("ray_server.py")
    result = subprocess.run(
        [sys.executable, script, fake_bundle],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [one for one in result.stdout.splitlines() if one.startswith("{")]  # Ray prints too
    found = json.loads(line)
    assert found["answered"] == {"200": 12}
    assert found["replicas"] == {"RUNNING": 2}
    assert found["jobs"] == 404
