"""`sdengine batch`: parses, calls, prints. Nothing heavy is imported until it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .batch import Engine, Failed

FAILED = 1  # exit status when a picture or a line is missing


def batch(
    requests: Annotated[
        Path,
        typer.Argument(
            help="JSON, one request a line: an object with the fields of a request and image, mask,"
            " depth beside them, or a prompt alone."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder of the pictures, and of results.jsonl."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="An embedded model's name, a bundle, a checkpoint or a diffusers folder.",
        ),
    ] = None,
    common: Annotated[
        str | None,
        typer.Option(help="Fields for all lines that do not give them: '{\"steps\": 20}'."),
    ] = None,
    format: Annotated[str, typer.Option(help="Of the pictures: png, jpg, webp.")] = "png",
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", "-k", help="Leave out what cannot be run, and say so."),
    ] = False,
    together: Annotated[
        int,
        typer.Option(
            "--batch",
            min=1,
            max=64,
            help="Pictures in one network call: lines that differ in words and seeds alone share"
            " it. Faster on most GPUs; the last bits of a picture may differ.",
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Make them on a Ray cluster: its address, auto, or local for one on this machine."
        ),
    ] = None,
    worker_cpus: Annotated[
        float | None,
        typer.Option(min=0, help="With --ray: of a worker; without it, all of a Ray node."),
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="With --ray: of a worker; without it, one where there are any."),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Where to save all pictures on one sheet, too.")
    ] = None,
    grid_columns: Annotated[
        int | None, typer.Option(help="Pictures in a row of it; without it, about square.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="The engine; without it, the fastest.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the arithmetic; without it, the fastest proved one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="OpenVINO: CPU, GPU, GPU.1, NPU, AUTO. NVIDIA backends: cuda, cuda:1."),
    ] = None,
    low_memory: Annotated[
        bool | None, typer.Option("--low-memory", help="Keep one network at a time in memory.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the paths.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make the pictures of a file of requests; started again, go on where it was stopped."""
    from .. import api
    from ..engine.bundle import open_bundle
    from ..engine.grid import check_columns
    from ..engine.outputs import Output
    from . import batch as batches
    from . import lines, plan
    from .contact import sheet
    from .progress import progress

    suffix = batches.check_suffix(format)
    check_columns(grid_columns)
    if grid is not None:
        Output(file=grid).check()
    how = _given(backend=None if backend == "auto" else backend, precision=precision)
    place = api.find_model(api.DEFAULT if model is None else model)
    bundle = open_bundle(place)
    found = lines.read(
        requests, None if common is None else lines.common_fields(common), plan.Checker(bundle)
    )
    if found.bad and not keep_going:
        raise lines.refuse(requests, found.bad)
    for one in found.bad:
        _say(f"left out: {one.text()}")
    wanted = plan.items(found.good, bundle.id, how, suffix)
    loading = {**how, **_given(threads=threads, device=device, low_memory=low_memory)}
    engine: Engine = batches.Local(lambda preset: api.load(place, **loading, preset=preset))
    if ray is not None:
        from .ray_batch import Cluster

        asked = api.DEFAULT if model is None else model
        named = asked if asked in api.EMBEDDED else str(place.absolute())
        engine = Cluster(ray, named, bundle.id, loading, worker_cpus, worker_gpus)
    with progress(quiet) as tick:
        hooks = batches.Hooks(
            on_file=(lambda _: None) if as_json else _print_path,
            on_failure=_say_failure,
            on_progress=tick,
        )
        outcome = batches.run(
            wanted, out, engine, keep_going=keep_going, together=together, hooks=hooks
        )
    outcome.bad = len(found.bad)
    made = None
    if grid is not None and outcome.paths:
        made = sheet(outcome.paths, grid, grid_columns)
    if as_json:
        typer.echo(json.dumps(_summary(outcome, out, made)))
    elif made is not None:
        _print_path(made)
    if not quiet:
        _say(
            f"{outcome.made} made in {outcome.seconds:.1f} s, {outcome.already} were there,"
            f" {outcome.failed} failed, {outcome.bad} lines left out"
        )
    if not outcome.whole:
        raise typer.Exit(FAILED)


def _summary(outcome: Any, out: Path, made: Path | None) -> dict[str, Any]:
    return {
        "out": str(out),
        "wanted": outcome.wanted,
        "made": outcome.made,
        "already": outcome.already,
        "failed": outcome.failed,
        "bad_lines": outcome.bad,
        "seconds": round(outcome.seconds, 3),
        "pictures": [str(path) for path in outcome.paths],
        "grid": None if made is None else str(made),
    }


def _say_failure(failed: Failed) -> None:
    names = ", ".join(item.name for item in failed.items)
    _say(f"failed: line {failed.items[0].line}: {failed.error.message} ({names})")
    _say(f"hint: {failed.error.hint}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_path(path: Path) -> None:
    """The name's own bytes: a file name need not be text."""
    typer.echo(os.fsencode(path))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
