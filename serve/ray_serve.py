"""The server on a Ray cluster: Ray Serve starts as many of it as the work calls for, one on each
GPU (or Ray node), sends each request to one of them, and replaces those that were lost.

Each replica is the whole application of `app.create_app`, with its queue and its worker. What a
client asks for in one request needs nothing more. A job of `/jobs` lives in one replica, and the
next request may reach another: there it is refused, with the reason.

A request with the header `serve_multiplexed_model_id: NAME` goes to a replica that has used that
model before, where there is one.

checked by  tests/serve/test_ray_serve.py
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.errors import NotFound, RequestError
from .config import Config, Engine
from .ray_batch import connect, resources

NAME = "sdengine"
ONGOING = 2.0  # requests of a replica that Ray aims at: one runs, one waits
HELD = 8  # models of a replica that Ray remembers

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def run(
    config: Config,
    address: str,
    cpus: float | None = None,
    gpus: float | None = None,
    replicas: int | None = None,
) -> None:
    """Until it is interrupted.

    cpus, gpus  of a replica; None: see ray_batch.resources
    replicas    at most; None: as many as the cluster has room for now
    raises      MissingExtra, BackendUnavailable; RequestError for --ui
    """
    if config.ui:
        raise RequestError(
            "the web page keeps a conversation, and --ray answers from several processes",
            hint="leave --ui out here, and run `sdengine serve --ui` beside it",
        )
    ray = connect(address)
    serve = importlib.import_module("ray.serve")
    each = resources(ray, cpus, gpus)
    most = _room(ray, each) if replicas is None else replicas
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(deployment(config, each, most), name=NAME, route_prefix="/", blocking=True)


def application(args: Mapping[str, Any]) -> Any:
    """For `serve deploy` and KubeRay: `import_path: sdengine.serve.ray_serve:application`.

    models      name -> what `sdengine serve --model` takes
    token_file  who may ask: the cluster's network reaches it, so it does not start without
    cpus, gpus, replicas   of one replica, and how many at most
    backend, precision, queue   as the options of `sdengine serve`
    raises      RequestError for any other name, and without a token; StorageError
    """
    from ..api import find_model
    from .tokens import read_tokens

    known = {
        "models", "token_file", "cpus", "gpus", "replicas", "backend", "precision", "queue",
    }  # fmt: skip
    if strange := sorted(set(args) - known):
        raise RequestError(
            f"unknown arguments of the application: {', '.join(strange)}",
            hint=f"it takes {', '.join(sorted(known))}",
        )
    file = args.get("token_file")
    if file is None:
        raise RequestError(
            "the application is reached from other machines, and there is no token",
            hint="give args.token_file, a path in every pod: see deploy/kuberay.yaml",
        )
    models = {name: find_model(place) for name, place in args["models"].items()}
    own = Config(models)
    config = replace(
        own,
        tokens=read_tokens(Path(file)),
        queue=args.get("queue", own.queue),
        engine=Engine(
            backend=args.get("backend", own.engine.backend), precision=args.get("precision")
        ),
    )
    each = {"num_cpus": float(args.get("cpus", 1)), "num_gpus": float(args.get("gpus", 0))}
    return deployment(config, each, args.get("replicas", 1))


def deployment(config: Config, each: Mapping[str, float], most: int, least: int = 1) -> Any:
    """The application, bound, of `least` to `most` replicas."""
    serve = importlib.import_module("ray.serve")
    if config.engine.threads is None and each["num_cpus"] >= 1:
        config = replace(config, engine=replace(config.engine, threads=int(each["num_cpus"])))

    def build() -> App:
        """In the replica."""
        from .app import create_app

        return routed(create_app(config), config)

    made = serve.deployment(
        name=NAME,
        ray_actor_options=dict(each),
        autoscaling_config={
            "min_replicas": least, "max_replicas": most, "target_ongoing_requests": ONGOING,
        },
        max_ongoing_requests=config.queue,
        graceful_shutdown_timeout_s=config.grace_s,
    )  # fmt: skip
    return made(serve.ingress(build)()).bind()


def routed(app: App, config: Config) -> App:
    """The application as one of several: it says which models it holds, and keeps no jobs."""
    serve = importlib.import_module("ray.serve")

    async def hold(name: str) -> str:
        return name

    held = serve.multiplexed(max_num_models_per_replica=HELD)(hold)

    async def outer(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            name = serve.get_multiplexed_model_id()
            if name in config.models:
                await held(name)
            if scope["path"] == "/jobs" or scope["path"].startswith("/jobs/"):
                await refused_jobs()(scope, receive, send)
                return
        await app(scope, receive, send)

    return outer


def refused_jobs() -> Any:
    """The answer to /jobs, an ASGI application."""
    from .faces import answer

    error = NotFound(
        "jobs live in one process, and this server is several of them",
        hint="ask /v1/images/generations or /sdapi/v1/txt2img, which answer with the pictures; or"
        " run `sdengine serve` without --ray",
    )
    return answer("jobs", error)


def _room(ray: Any, each: Mapping[str, float]) -> int:
    """Replicas that fit, node by node."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    fits = [
        min(
            (node["Resources"].get(names[name], 0) // size for name, size in each.items() if size),
            default=1,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return max(1, int(sum(fits)))
