"""`sdengine bench`: parses, calls, prints. stdout is data, everything else goes to stderr."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.errors import RequestError, SdengineError

if TYPE_CHECKING:
    from .results import Results

INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
TERMINATED = 143  # and SIGTERM
FAILED_GATE = 1

app = typer.Typer(
    name="bench",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="An embedded model's name, a bundle or a checkpoint.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The results file; valid after every row.")]
Size = Annotated[
    str | None, typer.Option(help="Width x height in pixels: 512x512; without it, the model's own.")
]
Steps = Annotated[int | None, typer.Option("--steps", "-s", help="Levels of noise.")]
Guidance = Annotated[float | None, typer.Option("--guidance", "-g", help="Scale; 1 is off.")]
Sampler = Annotated[str | None, typer.Option(help="The solver.")]
Runs = Annotated[int, typer.Option(min=1, help="Pictures that are timed, for each row.")]
WarmUps = Annotated[
    int, typer.Option("--warm-ups", min=1, help="Pictures before, which do not count.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Text file, a prompt a line: run in turn, and quality is over all of them."),
]


def careful(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose every failure is one message on stderr and an exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with ended_cleanly():
                command(*args, **kwargs)
        except SdengineError as error:
            say(f"error: {error.message}\n\nhint: {error.hint}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted: the results file holds the rows that were done")
            raise typer.Exit(INTERRUPTED) from None

    return run


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does: workers end, and gigabytes of compiled networks in the
    temporary folder go."""

    def unwind(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.callback(invoke_without_command=True)
@careful
def bench(
    ctx: typer.Context,
    model: Model = "emoji",
    backends: Annotated[
        str | None, typer.Option(help="With commas between; without it, all that are known.")
    ] = None,
    cases: Annotated[
        str | None, typer.Option(help="With commas between: picture, ddim20, short, batch, ...")
    ] = None,
    out: Out = Path("results.json"),
    precision: Annotated[
        str | None, typer.Option(help="With commas between; without it, all that were proved.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="With commas between: 1,2; without it, the backend's choice.")
    ] = None,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    batch: Annotated[int | None, typer.Option(help="Pictures at once.")] = None,
    prompts: Prompts = None,
    runs: Runs = 5,
    warm_ups: WarmUps = 1,
    reference: Annotated[
        str, typer.Option(help="Backend whose float32 pictures are the reference.")
    ] = "openvino",
    warm_start: Annotated[
        bool, typer.Option("--warm-start/--no-warm-start", help="Time a second start too.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model here: start, steps, networks, memory, and quality on every row."""
    if ctx.invoked_subcommand is not None:
        return
    from ..backends import NAMES
    from . import cases as known
    from . import suite

    overrides = given(steps=steps, sampler=sampler, guidance=guidance, **sides(size))
    overrides |= {} if batch is None else {"count": batch, "batch_size": batch}
    wish = known.Wish(
        model=model,
        backends=NAMES if backends is None else names(backends),
        cases=known.DEFAULT_CASES if cases is None else names(cases),
        overrides=overrides,
        precisions=None if precision is None else names(precision),
        threads=(None,) if threads is None else whole_numbers("--threads", threads),
        prompts=known.PROMPTS if prompts is None else lines_of(prompts),
        runs=runs,
        warmups=warm_ups,
    )
    found = suite.bench(wish, out, reporter(quiet), reference=reference, warm_start=warm_start)
    show(found, out, as_json)


@app.command()
@careful
def compare(
    first: Annotated[Path, typer.Argument(help="A results file: before.")],
    second: Annotated[Path, typer.Argument(help="A results file: after.")],
    max_slowdown: Annotated[
        float | None,
        typer.Option(help="End with status 1 when a row takes more than this many times as long."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ratios of two results files, with their spread; a gate with --max-slowdown."""
    from . import compare as comparing
    from . import results

    before, after = results.load(first), results.load(second)
    found = comparing.compare(before, after)
    failed = [] if max_slowdown is None else comparing.gate(found, before, max_slowdown)
    for difference in found.conditions:
        say(f"warning: other conditions: {difference}")
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "failed": failed}, allow_nan=False))
    else:
        typer.echo("\n".join(comparing.lines(found)))
    for failure in failed:
        say(f"too slow: {failure}")
    if failed:
        raise typer.Exit(FAILED_GATE)


@app.command()
@careful
def report(
    file: Annotated[Path, typer.Argument(help="A results file.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A .md, .csv or .html file; without it, Markdown."),
    ] = None,
) -> None:
    """Make a table or a page with plots from a results file."""
    from . import report as tables
    from . import results
    from .page import page

    makers: dict[str, Callable[[Results], str]] = {
        ".md": tables.markdown,
        ".csv": tables.as_csv,
        ".html": page,
    }
    found = results.load(file)
    if out is None:
        typer.echo(tables.markdown(found), nl=False)
        return
    if out.suffix not in makers:
        raise RequestError(
            f"{out} is no kind of report", hint=f"give a name that ends in {', '.join(makers)}"
        )
    results.write(out, makers[out.suffix](found))
    typer.echo(str(out))


@app.command()
@careful
def renew(
    document: Annotated[Path, typer.Argument(help="A Markdown file with `<!-- bench: NAME -->`.")],
    results_folder: Annotated[
        Path, typer.Option("--results", help="Where the results files named there lie.")
    ] = Path("bench/results"),
) -> None:
    """Make the tables of a document anew from committed results; print its path."""
    from . import report as tables
    from . import results

    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{document} cannot be read: {error}", hint="name a Markdown file in UTF-8"
        ) from error
    results.write(document, tables.renew(text, results_folder, results.load))
    typer.echo(str(document))


@app.command()
@careful
def ladder(
    model: Model = "emoji",
    rungs: Annotated[
        Path | None, typer.Option(help="JSON list of rungs; without it, the one in bench/ladder.py")
    ] = None,
    out: Out = Path("ladder.json"),
    size: Size = None,
    steps: Steps = None,
    prompts: Prompts = None,
    runs: Runs = 3,
    warm_ups: WarmUps = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """From eager float32 to the fastest, one change a rung; what failed stays, with its reason."""
    from . import cases as known
    from . import ladder as climbing

    overrides = {"seed": known.SEED, **given(steps=steps, **sides(size))}
    found = climbing.climb(
        model,
        climbing.RUNGS if rungs is None else climbing.read(rungs),
        out,
        reporter(quiet),
        overrides=overrides,
        prompts=known.PROMPTS if prompts is None else lines_of(prompts),
        runs=runs,
        warmups=warm_ups,
    )
    show(found, out, as_json, climbing.markdown)


@app.command()
@careful
def peers(
    home: Annotated[
        Path, typer.Argument(help="Where bench.peers.envs and bench.peers.models put things.")
    ],
    model: Model = "emoji",
    ours: Annotated[str, typer.Option(help="Our variants, with commas between.")] = "exact",
    against: Annotated[
        str | None, typer.Option(help="Peers, with commas between; without it, all.")
    ] = None,
    out: Out = Path("peers.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each peer, A B A C A.")] = 5,
    turns: Annotated[
        str | None, typer.Option(help="Other numbers of turns: diffusers-f32=1,exact=3.")
    ] = None,
    fewer: Annotated[
        str | None,
        typer.Option(help="Fewer steps for slow ones, their picture composed: sdcpp-q8_0=2."),
    ] = None,
    warm_ups: WarmUps = 1,
    warm_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a warm-up; without it, --steps.")
    ] = None,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds for one load or picture; then it is a failed row.")
    ] = 1800.0,
    reference: Annotated[
        Path | None, typer.Option(help="File that keeps our float32 picture for the next run.")
    ] = None,
    size: Size = "512x512",
    steps: Annotated[int, typer.Option("--steps", "-s", help="Levels of noise.")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Scale; 1 is off.")] = 7.5,
    sampler: Annotated[str, typer.Option(help="The solver; all peers have ddim.")] = "ddim",
    threads: Annotated[
        int | None, typer.Option(min=1, help="For all of them; without it, each its own choice.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Other engines against ours, in turn in one run: ratios that hold on a noisy machine."""
    from . import cases as known
    from . import interleave, pace
    from .peers.catalogue import PEERS

    request = {"seed": known.SEED, "prompt": known.PROMPTS[0], "sampler": sampler, "steps": steps}
    request |= {"guidance": guidance, **sides(size)}
    chosen = tuple(PEERS) if against is None else names(against)
    setup = interleave.setup(model, home, names(ours), chosen, threads, limit)
    asked, few = pace.counts("--turns", turns), pace.counts("--fewer", fewer)
    pace.check_names("--turns", asked, [*setup.peers, *setup.ours])
    pace.check_names("--fewer", few, list(setup.peers))
    paced = pace.Pace(rounds, asked, few, warm_ups, warm_steps)
    precisions = ("f32", "bf16", "int8")
    found = interleave.run(
        setup, request, out, reporter(quiet), paced, keep=reference, rates=precisions
    )
    show(found, out, as_json)


def show(
    found: Results, out: Path, as_json: bool, table: Callable[[Results], str] | None = None
) -> None:
    from . import report as tables

    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        typer.echo((tables.markdown if table is None else table)(found), nl=False)
    say(f"written to {out}")


def reporter(quiet: bool) -> Callable[[str, int, int], None]:
    def report(what: str, done: int, total: int) -> None:
        if not quiet:
            say(f"{done} of {total} done; now {what}")

    return report


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def given(**options: Any) -> dict[str, Any]:
    """Options that the user gave; for the others the called function's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2` -> (1, 2). Raises RequestError."""
    parts = names(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(
            f"{option} is {text!r}", hint=f"give whole numbers from 1 up: {option} 1,2"
        )
    return tuple(int(part) for part in parts)


def sides(text: str | None) -> dict[str, int]:
    """`768x512` -> its width and height. Raises RequestError."""
    if text is None:
        return {}
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise RequestError(f"--size is {text!r}", hint="give width x height: --size 768x512")
    return {"width": int(width), "height": int(height)}


def lines_of(path: Path) -> tuple[str, ...]:
    """The prompts in a file, empty lines left out. Raises RequestError."""
    try:
        found = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the prompts in {path} cannot be read: {error}",
            hint="name a text file in UTF-8, a prompt a line",
        ) from error
    if not found:
        raise RequestError(f"{path} holds no prompt", hint="write a prompt a line into it")
    return found
