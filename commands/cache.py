"""`sdengine cache list|verify|prune`: the compiled networks that this machine keeps.

The CLI registers these functions; what they print as JSON has a test that reads it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.errors import RequestError, StorageError

if TYPE_CHECKING:
    from ..backends.cache import Entry, Store

GB = 10**9
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


def show(as_json: Json = False) -> None:
    """Every compiled network, the one used last at the end; and what they take in all."""
    store = _store()
    entries = store.entries()
    total = sum(e.size for e in entries)
    if as_json:
        _json(
            {
                "path": str(store.root),
                "limit": store.limit,
                "bytes": total,
                "entries": [_facts(e) for e in entries],
            }
        )
        return
    for entry in entries:
        what, used = entry.what, f"{_time(entry.used):%Y-%m-%d %H:%M}"
        name = f"{what['backend']} {what['component']} {what['precision']}"
        typer.echo(f"{entry.size / GB:7.3f} GB  {used}  {name} ({what['shapes']})")
        typer.echo(f"{'':29}for {entry.made.get('device', '?')}, {_library(entry)}")
    typer.echo(f"{total / GB:7.3f} GB in {store.root}, of {store.limit / GB:.1f} at most")


def verify(
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what is not whole; the next run rebuilds it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every byte of every compiled network; end with status 1 where one is not whole."""
    from ..backends.cache import remove_entry

    store = _store()
    bad = store.verify()
    if remove:
        for folder, _ in bad:
            remove_entry(folder)
    if as_json:
        faults = [{"path": str(folder), "fault": why} for folder, why in bad]
        _json({"path": str(store.root), "bad": faults, "removed": remove})
    else:
        for folder, why in bad:
            typer.echo(f"{'removed' if remove else 'bad'}: {folder}: {why}")
        typer.echo(f"{len(store.entries())} entries; {len(bad)} not whole")
    if bad and not remove:
        raise typer.Exit(1)


def prune(
    max_gb: Annotated[
        float | None,
        typer.Option(help="What may stay, in GB (10^9 bytes); without it, the cache's own cap."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the compiled networks used longest ago until the rest fits; 0 removes all."""
    if max_gb is not None and not 0 <= max_gb < float("inf"):
        raise RequestError(
            f"--max-gb {max_gb:g} is no size",
            hint="give a number of gigabytes, 0 or more: sdengine cache prune --max-gb 5",
        )
    store = _store()
    gone = store.prune(None if max_gb is None else int(max_gb * GB))
    kept = sum(e.size for e in store.entries())
    if as_json:
        _json({"path": str(store.root), "removed": [_facts(e) for e in gone], "bytes": kept})
        return
    freed = sum(e.size for e in gone)
    typer.echo(f"removed {len(gone)} entries, {freed / GB:.3f} GB; {kept / GB:.3f} GB stay")


def _store() -> Store:
    from ..backends.cache import Store

    try:
        return Store()
    except StorageError as error:
        raise StorageError(
            f"there is no place for a cache: {error.message}", hint=error.hint
        ) from error


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "path": str(entry.folder),
        "bytes": entry.size,
        "used": _time(entry.used).isoformat(timespec="seconds"),
        **entry.what,
        "made": dict(entry.made),
    }


def _library(entry: Entry) -> str:
    known = ("device", "processor", "threads")
    return ", ".join(f"{k} {v}" for k, v in entry.made.items() if k not in known)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))
