"""`sdengine serve`: parses, binds, runs. stdout has the address; everything else goes to stderr."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.errors import MissingExtra, StorageError
from .config import Config, Engine, Limits
from .place import read_devices

if TYPE_CHECKING:
    from .pool import Pool

app = typer.Typer(
    name="serve",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GIB = 2**30
BACKLOG = 2048
INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
OWN = Config({})  # whose fields are the defaults
LIMITS = Limits()


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="An embedded model's name, a bundle or a checkpoint, or NAME=one of those; repeat."
            " The first is meant where a request names none.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = OWN.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = OWN.port,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Who may ask: `token` or `user:password`, one a line."),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A web page at /.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = OWN.queue,
    workers: Annotated[int, typer.Option(min=1, help="Engines, each a process.")] = OWN.workers,
    device: Annotated[
        str | None,
        typer.Option(
            help="What workers run on, one each: cuda:0,cuda:1 on a machine with two GPUs."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests of one shape in one network call; without it, 4 where"
            " that pays, measured at the start.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="GiB that a worker may hold; models not used for longest are closed."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=1, help="Seconds from a request to its last picture.")
    ] = OWN.deadline_s,
    hang: Annotated[
        float, typer.Option(min=1, help="Seconds without a step: a worker hangs.")
    ] = OWN.hang_s,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to finish in when told to stop.")
    ] = OWN.grace_s,
    max_pixels: Annotated[
        int, typer.Option(min=256, help="Of a picture that is made.")
    ] = LIMITS.pixels,
    max_pictures: Annotated[int, typer.Option(min=1, help="In one request.")] = LIMITS.pictures,
    max_steps: Annotated[int, typer.Option(min=1, help="In one request.")] = LIMITS.steps,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of one request.")] = LIMITS.body
    // 2**20,
    backend: Annotated[str, typer.Option("--backend", "-b", help="The engine.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Of the arithmetic.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    preset: Annotated[str | None, typer.Option(help="Whose precision is taken.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Serve from a Ray cluster: its address, auto, or local for one on this machine."
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: at most; without it, as many as there is room for."),
    ] = None,
    worker_cpus: Annotated[
        float | None,
        typer.Option(min=0, help="With --ray: of a replica; without it, all of a Ray node."),
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="With --ray: of a replica; without it, one where there are any."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say less.")] = False,
) -> None:
    """Answer over HTTP, as AUTOMATIC1111 and OpenAI do; docs/serve.md has it all.

    Without --token-file it listens to this machine alone.
    """
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    _check_installed()
    from ..api import find_model
    from .models import named, split
    from .tokens import check_open, read_tokens

    tokens = () if token_file is None else read_tokens(token_file)
    check_open(host, tokens)
    devices = read_devices(device)
    places = ["emoji"] if model is None else model
    found = {place: find_model(place) for _, place in map(split, places)}
    limits = Limits(
        body=max_body * 2**20, pixels=max_pixels, pictures=max_pictures, steps=max_steps
    )
    config = Config(
        models=named(places, found), tokens=tokens, host=host, port=port, queue=queue,
        workers=max(workers, len(devices)), devices=devices, batch=batch,
        memory=None if memory is None else int(memory * GIB),
        deadline_s=deadline, hang_s=hang, grace_s=grace, ui=ui, limits=limits,
        engine=Engine(backend, precision, threads, preset),
    )  # fmt: skip
    if ray is not None:
        from . import ray_serve

        ray_serve.run(config, ray, worker_cpus, worker_gpus, replicas)
        return
    run(config)


def run(config: Config) -> None:
    """Until it is told to stop. Raises what kept its first worker from starting."""
    import uvicorn

    from .app import create_app

    class Server(uvicorn.Server):
        """Ends when no worker can be started; drains the queue before it closes connections."""

        def __init__(self, config: uvicorn.Config, pool: Pool) -> None:
            super().__init__(config)
            self._pool = pool

        async def on_tick(self, counter: int) -> bool:
            if told or self._pool.failed is not None:
                self.should_exit = True
            return await super().on_tick(counter)

        async def shutdown(self, sockets: Any = None) -> None:
            closing = asyncio.create_task(self._pool.close())
            await super().shutdown(sockets)
            await closing

    told: list[int] = []  # before uvicorn has its own handler, and once more at its end
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    listening = bind(config.host, config.port)
    application = create_app(config)
    pool = application.state.served.pool
    host, port = listening.getsockname()[:2]
    typer.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server = Server(
        uvicorn.Config(
            application, log_level="warning", access_log=False, server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(config.grace_s) + 10, ws="none",
        ),
        pool,
    )  # fmt: skip
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # Ctrl-C, after it has stopped as on SIGTERM
        raise typer.Exit(INTERRUPTED) from None
    if pool.failed is not None:
        raise pool.failed


def bind(host: str, port: int) -> socket.socket:
    """Before anything is loaded. Raises StorageError when the port is taken or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # TCP by name: without, asyncio leaves Nagle's algorithm on, and each answer takes 40 ms more
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)  # who comes before all is up waits
    except OSError as error:
        listening.close()
        raise StorageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="name another with --port, or --port 0 for any that is free",
        ) from None
    return listening


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        if find_spec(name) is None:
            raise MissingExtra(
                f"serving needs the package {name}", hint="pip install 'sdengine[serve]'"
            )
