"""`sdengine pack`: parses, calls, prints. Nothing heavy is imported until it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def pack(
    model: Annotated[str, typer.Argument(help="An embedded model's name or a bundle.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="box.pyz, which runs by itself, or box.tar."),
    ],
    extra: Annotated[
        list[str] | None,
        typer.Option("--extra", "-e", help="Of sdengine, to go with it: serve; repeat."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Python of the box: 3.11; without it, as here.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Processor of the box: x86_64, aarch64; without it, as here.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="A folder of wheels, in place of the package index.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the bundle on the box; without it, as here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make one file that installs sdengine and a model on a box without internet."""
    from .. import api
    from ..engine.bundle import open_bundle
    from . import pack as packs
    from .wheels import Target

    packs.check_name(out)
    bundle = open_bundle(api.find_model(model), verify=True)
    said: set[str] = set()

    def report(what: str, done: float) -> None:
        if not quiet and what not in said:
            said.add(what)
            sys.stderr.write(f"{what}\n")

    made = packs.pack(
        bundle,
        out,
        extras=[] if extra is None else extra,
        target=Target(python, machine),
        links=wheels,
        name=name,
        progress=report,
    )
    size = made.stat().st_size
    if as_json:
        typer.echo(json.dumps({"pack": str(made), "bytes": size, "bundle": bundle.id}))
        return
    typer.echo(os.fsencode(made))
    if not quiet:
        start = f"python3 {made.name}" if made.suffix == ".pyz" else "python3 install.py"
        sys.stderr.write(f"{size / 1e6:.0f} MB; on the box: {start} --prefix /opt/sdengine\n")
