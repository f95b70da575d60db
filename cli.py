"""The command line: parses, calls, prints. stdout is data, everything else goes to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from . import __version__
from .commands import cache as caching
from .engine.errors import NotABundle, RequestError, SdengineError, UnknownName
from .serve.batch_command import batch
from .serve.pack_command import pack

if TYPE_CHECKING:
    from .engine.pipeline import Result

# called with (what is being done, how much of it is done, how much there is)
Report = Callable[[str, float, float], None]

INTERRUPTED = 130  # as a shell reports a process that SIGINT ended

app = typer.Typer(
    name="sdengine",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich alone takes longer to import than --help may take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app(prog_name="sdengine")


class Careful(TyperCommand):
    """A command whose every failure is one message on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except SdengineError as error:
            _say(f"error: {error.message}\n\nhint: {error.hint}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # the reader has gone; what Python flushes when it ends must not fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if ctx.find_root().params["debug"]:
                traceback.print_exc()
            name = type(error).__name__
            _say(
                f"error: unexpected {name}: {error}\n\n"
                f"hint: report this; `sdengine --debug {ctx.info_name} ...` shows where it happened"
            )
            raise typer.Exit(1) from None


class RunCommand(Careful):
    """Its help names the defaults and the choices, which only the engine knows."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from .backends import ALL
        from .engine.request import DEFAULTS, NAMES_OF, Request
        from .engine.spec import PRECISIONS

        choices: dict[str, Iterable[str]] = {
            **NAMES_OF,
            "precision": PRECISIONS,
            "backend": ("auto", *ALL),
        }
        own = Request().to_dict()
        for option in self.params:
            name = str(option.name)
            notes = [", ".join(choices[name])] if name in choices else []
            if own.get(name) not in (None, "") and not isinstance(own[name], bool):
                notes.append(f"default {own[name]}")
            notes.extend(_default_by_task(name, DEFAULTS))
            if notes:
                option.help = f"{option.help} [{'; '.join(notes)}]"  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _default_by_task(name: str, defaults: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`default 25`, or `default 7.5, upscale 9.0` where the tasks do not agree."""
    by_task = {task: fields[name] for task, fields in defaults.items() if name in fields}
    if not by_task:
        return []
    values = list(by_task.values())
    usual = max(values, key=values.count)
    others = [f"{task} {value}" for task, value in by_task.items() if value != usual]
    return [", ".join([f"default {usual}", *others])]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sdengine {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an unexpected error happened.")
    ] = False,
) -> None:
    """Stable Diffusion 2 as engines: export a checkpoint, then run it fast and correctly."""


Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON (run: one a prompt).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no timings.")]


@app.command(cls=RunCommand)
def run(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="What to keep away from.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="An embedded model's name, a bundle, a checkpoint file or a diffusers folder; "
            "without it, the embedded model.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="A picture file (.png, .jpg, .webp), or a folder, where names are made from "
            "prompt and seed; without it, the current folder.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Without it, what the model and the pictures call for.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="A picture to start from; repeat, to mix several."),
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Which part of the picture to repaint: white is repainted.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(help="A depth map, white is near; without it, one is made.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of the picture to repaint, 0 to 1.")
    ] = None,
    noise_level: Annotated[
        int | None,
        typer.Option(help="Noise put into what an upscaler or a model of variations is shown."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of a picture in the mixture; once for each.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; without it, the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; without it, the model's own.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-s", help="Levels of noise.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="How closely to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The solver.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Spacing of the levels; without it, the sampler's own.")
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(help="Levels of noise (sigma / alpha), largest first: 14.6,5,2,0.8,0."),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="What the network is told, largest first: 999,749,499,249.")
    ] = None,
    zero_snr: Annotated[
        bool | None,
        typer.Option("--zero-snr", help="Start at pure noise: for v models so trained."),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Fresh noise in each step, 0 to 1, for some samplers.")
    ] = None,
    s_noise: Annotated[
        float | None, typer.Option(help="What the fresh noise of a step is multiplied by.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A trade of quality for speed; other options go before it.")
    ] = None,
    cache: Annotated[
        int | None, typer.Option(help="Run the network whole every so many steps; 1: always.")
    ] = None,
    cut: Annotated[
        int | None, typer.Option(help="Where the network is cut for the cache; 0 is the cheapest.")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Guide between two levels of noise only: 0.2,6.")
    ] = None,
    guidance_scales: Annotated[
        str | None, typer.Option(help="One for each network call, with commas between.")
    ] = None,
    cfg_plus_plus: Annotated[
        float | None, typer.Option(help="CFG++ in place of guidance: its share, 0 to 1.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="A sampler in a JSON file; see docs/samplers.md.")
    ] = None,
    rescale: Annotated[
        float | None, typer.Option(help="Against overexposed pictures of high guidance, 0 to 1.")
    ] = None,
    halves: Annotated[
        str | None, typer.Option(help="The halves of guidance in one network call, or in two.")
    ] = None,
    prompt_weights: Annotated[
        bool | None, typer.Option("--prompt-weights", help="Read (word:1.3) and [word] as weights.")
    ] = None,
    long_prompt: Annotated[
        bool | None, typer.Option("--long-prompt", help="Do not cut prompts off at 75 tokens.")
    ] = None,
    variation_seed: Annotated[
        int | None, typer.Option(help="Turn the noise of --seed towards that of this seed.")
    ] = None,
    variation_strength: Annotated[float | None, typer.Option(help="How far, 0 to 1.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first picture; without it, one is drawn.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-c", help="How many pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures in one network call.")] = None,
    noise: Annotated[str | None, typer.Option(help="Where noise is drawn from.")] = None,
    resize: Annotated[
        str | None, typer.Option(help="How a picture comes to the width and height asked for.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="What lies under a transparent picture: a colour.")
    ] = None,
    invert_mask: Annotated[
        bool | None, typer.Option("--invert-mask", help="Repaint black, not white.")
    ] = None,
    mask_blur: Annotated[
        float | None, typer.Option(help="Softness in pixels of the seam around what is repainted.")
    ] = None,
    thin_mask: Annotated[
        str | None, typer.Option(help="max keeps strokes thinner than a cell of the latent.")
    ] = None,
    paste: Annotated[
        bool | None,
        typer.Option("--paste/--no-paste", help="Put the unmasked part itself back (default)."),
    ] = None,
    watermark: Annotated[
        bool | None,
        typer.Option("--watermark/--no-watermark", help="The invisible mark SDV2 (default: on)."),
    ] = None,
    safety: Annotated[
        str | None, typer.Option(help="What to do where the bundle's classifier objects.")
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Side of the tiles of a large picture in latent cells, auto or off."),
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help="reference: its own defaults, spacing and noise levels.")
    ] = None,
    from_picture: Annotated[
        Path | None,
        typer.Option("--from", help="Repeat the run of a picture; other options change it."),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from-file", help="Prompts, one a line; blank lines are skipped."),
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
    threads: Annotated[
        int | None, typer.Option(help="Processor threads; `doctor` shows what is taken without it.")
    ] = None,
    cores: Annotated[
        str | None, typer.Option(help="fast or all, where a processor has slow ones too.")
    ] = None,
    numa_node: Annotated[
        str | None, typer.Option(help="Its number, or all; without it, those of one socket.")
    ] = None,
    pin: Annotated[
        bool | None,
        typer.Option("--pin/--no-pin", help="Each thread on its own core, or where there is room."),
    ] = None,
    hyper_threads: Annotated[
        bool | None, typer.Option("--hyper-threads", help="Two threads a core, where it has two.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="OpenVINO: CPU, GPU, GPU.1, NPU, AUTO. NVIDIA backends: cuda, cuda:1."),
    ] = None,
    while_building: Annotated[
        str | None,
        typer.Option(help="Serve on this backend while --backend builds its engines, then swap."),
    ] = None,
    low_memory: Annotated[
        bool | None, typer.Option("--low-memory", help="Keep one network at a time in memory.")
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(help="intel: start again with allocator, OpenMP and numactl set for torch."),
    ] = None,
    preview: Annotated[
        int | None,
        typer.Option(help="Every so many steps, write a rough picture to NAME.preview.png."),
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop after so many steps; goes with --save-latents.")
    ] = None,
    save_latents: Annotated[
        Path | None,
        typer.Option(help="Where to save a run that is stopped (Ctrl-C too), to go on later."),
    ] = None,
    from_latents: Annotated[
        Path | None, typer.Option(help="Go on with a run that --save-latents saved.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make pictures, from a prompt and from pictures; print their paths."""
    if launch is not None:
        from .backends.launch import again

        for line in again(launch, backend):
            _say(f"launch: {line}")
    asked = _given(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=schedule,
        sigmas=_numbers("sigmas", sigmas),
        timesteps=_numbers("timesteps", timesteps),
        zero_snr=zero_snr,
        eta=eta,
        s_noise=s_noise,
        preset=preset,
        cache=cache,
        cut=cut,
        guidance_interval=_numbers("guidance-interval", guidance_interval),
        guidance_scales=_numbers("guidance-scales", guidance_scales),
        cfg_plus_plus=cfg_plus_plus,
        solver=solver,
        rescale=rescale,
        halves=halves,
        prompt_weights=prompt_weights,
        long_prompt=long_prompt,
        variation_seed=variation_seed,
        variation_strength=variation_strength,
        seed=seed,
        count=count,
        batch_size=batch_size,
        task=task,
        strength=strength,
        noise_level=noise_level,
        weights=tuple(weight) if weight else None,
        noise=noise,
        resize=resize,
        background=background,
        invert_mask=invert_mask,
        mask_blur=mask_blur,
        thin_mask=thin_mask,
        paste=paste,
        watermark=watermark,
        safety=safety,
        tile=int(tile) if tile is not None and tile.isdecimal() else tile,
        compat=compat,
    )
    pictures = _given(image=image if image else None, mask=mask, depth=depth)
    how = _given(
        model=model,
        backend=backend,
        precision=precision,
        threads=threads,
        cores=cores,
        numa_node=numa_node,
        pin=pin,
        hyper_threads=hyper_threads,
        device=device,
        while_building=while_building,
        low_memory=low_memory,
    )
    if stop_after is not None and save_latents is None:
        raise RequestError(
            "--stop-after without --save-latents would throw the run away",
            hint="name a file for it: --save-latents run.latents",
        )
    if from_file is not None and (prompt, save_latents, from_latents) != (None, None, None):
        raise RequestError(
            "--from-file goes with neither --prompt nor --save-latents nor --from-latents",
            hint="leave those out, or give one --prompt in place of the file",
        )
    from .engine import grid as grids
    from .engine import prompts, state
    from .engine.outputs import Output
    from .engine.request import Progress, Request

    resume = None
    if from_picture is not None:
        from .api import recorded

        past = recorded(from_picture, pictures)
        asked, pictures, how = dict(past.request) | asked, past.pictures, past.how | how
    if from_latents is not None:
        resume = state.load(from_latents)
        asked = dict(resume.request) | asked
    request, output = Request.from_dict(asked), Output.parse(out)
    output.check()
    grids.check_columns(grid_columns)
    if grid is not None:
        Output(file=grid).check()
    requests = [request] if from_file is None else prompts.each(request, prompts.read(from_file))
    total = sum(one.count for one in requests)
    from . import api

    results: list[Result] = []
    last: list[state.Saved] = []
    moves = {"on_state": last.append, "stop_after": stop_after, "resume": resume}
    if save_latents is None:
        del moves["on_state"]
    loading = _given(**how, preset=request.preset)
    with (
        _progress(quiet) as report,
        api.load(**loading, progress=lambda what, done: report(what, done, 1.0)) as pipe,
    ):

        def on_step(at: Progress) -> None:
            done = sum(len(result.pictures) for result in results)
            report(f"picture {done + at.picture + 1} of {total}", at.step, at.steps)
            if preview is not None and at.guess is not None and at.step % preview == 0:
                output.preview(requests[len(results)].prompt, at.guess())

        for one in requests:
            paths: list[Path] = []
            try:
                for result in pipe.stream(one, on_step=on_step, **pictures, **_given(**moves)):
                    for picture in result.pictures[len(paths) :]:
                        paths.append(output.save(picture, total))
                        if not as_json:
                            _print_path(paths[-1])
            finally:
                if save_latents is not None and last and not paths:
                    _print_path(state.save(last[-1], save_latents))
            results.append(result)
            _conclude(result, paths, pipe.about, as_json=as_json, quiet=quiet)
    if grid is not None and any(result.pictures for result in results):
        made = grids.save(grid, results, grid_columns)
        if not as_json:
            _print_path(made)


def _conclude(
    result: Result, paths: Sequence[Path], about: dict[str, str], *, as_json: bool, quiet: bool
) -> None:
    """What is said of a run when its pictures are saved."""
    from .engine.describe import cost_line, timing_line

    for warning in result.warnings:
        _say(f"warning: {warning}")
    if not quiet:
        _say(timing_line(result.timings, about))
        _say(cost_line(result.request.preset, result.cost, len(result.timings.rows)))
    if as_json:
        _print_json(
            {
                "pictures": [
                    {"path": str(path), "seed": picture.request.seed}
                    for path, picture in zip(paths, result.pictures, strict=True)
                ],
                "request": result.request.to_dict(),
                "about": about,
                "cost": result.cost,
                "timings": vars(result.timings),
                "warnings": result.warnings,
            }
        )


@app.command(cls=Careful)
def export(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="A .ckpt or .safetensors file, a diffusers folder or a bundle.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder; for a bundle, itself by default."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="An engine to prove it on; repeat.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precisions to prove, with commas between: bf16,f32.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="eps or v: what the network predicts.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The yaml file or scheduler config of the checkpoint.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights.")] = None,
    cuts: Annotated[
        str | None,
        typer.Option(help="Where the UNet is cut for a feature cache: 0,1,2, or none."),
    ] = None,
    embedding_stats: Annotated[
        Path | None,
        typer.Option(help="Mean and deviation of the image embeddings, for unCLIP-L."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Prompts to calibrate 8 bits with, one a line; without it, our own."),
    ] = None,
    search: Annotated[
        float | None,
        typer.Option(help="Minutes to look for the layers that int8 hurts; for a bundle."),
    ] = None,
    safety: Annotated[
        Path | None,
        typer.Option(help="An image classifier to put in: model.onnx, or a folder with one."),
    ] = None,
    safety_label: Annotated[
        list[str] | None, typer.Option(help="A label of it that counts as unsafe; repeat.")
    ] = None,
    safety_threshold: Annotated[
        float | None, typer.Option(help="From this probability on it objects, 0..1.")
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(help="Compute capabilities to build for, with commas: 86,89,120 (trt-rtx)."),
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Picture sizes to build engines for: 512x512,768x768.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Pictures in one call: 1,4 (trt-rtx).")] = None,
    halves: Annotated[
        str | None, typer.Option(help="Of guidance in one call: 2, 1 or 2,1 (trt-rtx).")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="One engine for the whole range (trt-rtx).")
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Engines built at once (trt-rtx).")] = None,
    ema: Annotated[bool | None, typer.Option("--ema/--no-ema", help="Which weights.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --out.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(help="triton: write a bundle as a model repository of tritonserver."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a bundle; print the bundle's path."""
    from .engine.bundle import MANIFEST

    if layout is not None:
        _laid_out(ctx, layout)
        return
    if out is None and not (checkpoint / MANIFEST).is_file():
        raise RequestError(
            f"where should the bundle of {checkpoint} go?",
            hint=f"name a folder: sdengine export {checkpoint} --out {checkpoint.stem}",
        )
    place = checkpoint if out is None else out
    from .export import add_nvidia, export_bundle, nvidia_ask, open_checkpoint

    precisions = None if precision is None else precision.split(",")
    nvidia, ask = nvidia_ask(target or (), sm, shapes, batch, halves, dynamic, jobs)
    if nvidia:
        target = [t for t in target or () if t not in nvidia] or None
    added = bool(nvidia) and target is None and out is None  # to a bundle, and nothing else
    typed = _given(precisions=precisions)
    if nvidia and target is None:
        precisions = None  # those are for NVIDIA: the bundle is proved in its own
    how = _given(prediction=prediction, config=config, ema=ema, embedding_stats=embedding_stats)
    what = _given(
        targets=target, precisions=precisions, name=name, licence=licence, cuts=_cuts(cuts)
    )
    if calibration is not None:
        from .export.calibration import read_prompts

        what["prompts"] = read_prompts(calibration)
    if search is not None:
        _search(place, search, what, quiet)
        return
    looks = None
    if safety is not None:
        from .export import open_classifier

        looks = open_classifier(safety, **_given(unsafe=safety_label, threshold=safety_threshold))
    elif safety_label or safety_threshold is not None:
        raise RequestError(
            "--safety-label and --safety-threshold are about a classifier, and none was named",
            hint="name it: --safety model.onnx, or the folder that it came in",
        )
    with _progress(quiet) as report:
        bundle = place
        if not added and (looks is None or what or not (place / MANIFEST).is_file()):
            found = open_checkpoint(
                checkpoint, **how, progress=lambda done, total: report("reading", done, total)
            )
            bundle = export_bundle(
                found, place, **what, force=force, progress=lambda at, done: report(at, done, 1.0)
            )
        if nvidia:
            typed |= _given(prompts=what.get("prompts"))
            add_nvidia(
                bundle, nvidia, ask=ask, **typed, progress=lambda at, done: report(at, done, 1.0)
            )
        if looks is not None:
            from .export import add_classifier

            add_classifier(bundle, looks, lambda at, done: report(at, done, 1.0))
    if as_json:
        _print_json(_bundle_facts(bundle))
    else:
        _print_path(bundle)


def _laid_out(ctx: typer.Context, layout: str) -> None:
    """A bundle in another program's layout. Options that are about other things are refused."""
    from .export import repository

    if layout != "triton":
        raise UnknownName("layout", layout, ["triton"])
    taken = ("checkpoint", "out", "target", "layout", "quiet")
    given = [n for n in ctx.params if str(ctx.get_parameter_source(n)).endswith("COMMANDLINE")]
    if other := [f"--{name.replace('_', '-')}" for name in given if name not in taken]:
        raise RequestError(
            f"--layout goes without {', '.join(other)}",
            hint="make the bundle with those; then lay it out: sdengine export BUNDLE --layout",
        )
    bundle, out, targets = (ctx.params[name] for name in ("checkpoint", "out", "target"))
    if out is None or len(targets or ()) > 1:
        raise RequestError(
            "--layout triton needs one folder to write, and takes one target",
            hint=f"sdengine export {bundle} --layout triton --out models --target onnxruntime",
        )
    _print_path(repository(bundle, out, *(targets or ())))


def _search(bundle: Path, minutes: float, what: Mapping[str, Any], quiet: bool) -> None:
    """Quantise a bundle, and measure which layers are better left in float."""
    from .engine.bundle import MANIFEST
    from .export import add_target

    if not (bundle / MANIFEST).is_file():
        raise RequestError(
            f"{bundle} is no bundle yet: the search runs on one",
            hint="export first; then: sdengine export BUNDLE --precision int8 --search 30",
        )
    with _progress(quiet) as report:
        done = add_target(
            bundle,
            what.get("targets", ["openvino"]),
            what.get("precisions", ["int8"]),
            progress=lambda at, share: report(at, share, 1.0),
            prompts=what.get("prompts"),
            search_s=60 * minutes,
        )
    _print_path(done)


@app.command(cls=Careful)
def inspect(
    what: Annotated[str, typer.Argument(help="A bundle, an embedded model's name, or a picture.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compute every hash again.")] = False,
    between: Annotated[
        str | None,
        typer.Option("--compare", help="Two ways, value by value: onnxruntime:f32,trt:f16."),
    ] = None,
    graph: Annotated[str, typer.Option(help="What is compared: unet/full, unet/deep.")] = "unet",
    inputs: Annotated[
        Path | None, typer.Option(help="For it: the inputs.npz of a parity failure.")
    ] = None,
    small: Annotated[
        Path | None, typer.Option("--reduce", help="For it: a folder for the node that parts.")
    ] = None,
    least: Annotated[
        float, typer.Option(help="For it: values further apart than this have parted, in dB.")
    ] = 40.0,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle, or what a picture says of its making."""
    path = _named(what)
    if path.is_file():
        _inspect_picture(path, as_json)
        return
    from .api import preset_quality
    from .engine.bundle import open_bundle
    from .engine.describe import bundle_facts, bundle_lines, preset_lines

    bundle, presets = open_bundle(path, verify=verify), preset_quality(path)
    if between is not None:
        from .export import compared, shown

        found = compared(bundle, between, graph, inputs, least, small)
        _print_json(found) if as_json else typer.echo("\n".join(shown(found)))
        return
    if as_json:
        _print_json({**bundle_facts(bundle), "verified": verify, "presets": presets})
        return
    typer.echo("\n".join(bundle_lines(bundle, verified=verify)))
    if presets is not None:
        typer.echo("\n".join(preset_lines(presets)))


@app.command(
    cls=Careful,
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)
def bench(ctx: typer.Context) -> None:
    """Measure speed, memory and quality here; compare results (`sdengine bench --help`)."""
    from .bench.command import app as measuring

    measuring(args=ctx.args, prog_name="sdengine bench")


kept = typer.Typer(
    name="cache",
    help="The compiled networks that this machine keeps.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
kept.command("list", cls=Careful)(caching.show)
kept.command("verify", cls=Careful)(caching.verify)
kept.command("prune", cls=Careful)(caching.prune)
app.add_typer(kept)
app.command(cls=Careful)(batch)
app.command(cls=Careful)(pack)


@app.command(
    cls=Careful,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(ctx: typer.Context) -> None:
    """Answer over HTTP, as AUTOMATIC1111 and OpenAI do (`sdengine serve --help`)."""
    from .serve.command import app as serving

    serving(args=ctx.args, prog_name="sdengine serve")


@app.command(cls=Careful)
def doctor(as_json: Json = False) -> None:
    """What this machine can run; for the rest: why not, and the command that mends it."""
    from .backends.doctor import examine, lines

    found = examine()
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(lines(found)))
    if found["auto"] is None:
        raise typer.Exit(1)


def _inspect_picture(path: Path, as_json: bool) -> None:
    from .engine.describe import picture_facts, picture_lines

    if as_json:
        _print_json(picture_facts(path))
    else:
        typer.echo("\n".join(picture_lines(path)))


def _named(what: str) -> Path:
    from .api import EMBEDDED

    path = Path(what)
    if what in EMBEDDED and not path.exists():
        return EMBEDDED[what]
    if not path.exists() and path.name == what and not path.suffix:
        raise UnknownName("model", what, EMBEDDED)
    if not path.exists():
        raise NotABundle(f"there is no {path}", hint="name a bundle's folder, or a picture file")
    return path


def _given(**options: Any) -> dict[str, Any]:
    """Options that the user gave; for the others the called function's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def _cuts(text: str | None) -> tuple[int, ...] | None:
    if text is None or text == "none":
        return None if text is None else ()
    numbers = _numbers("cuts", text)
    assert numbers is not None
    return tuple(int(n) for n in numbers)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"--{name} {text!r} is no list of numbers",
            hint=f"give numbers with commas between: --{name} 14.6,5,0.8,0",
        ) from None


def _bundle_facts(path: Path) -> dict[str, Any]:
    from .engine.bundle import open_bundle
    from .engine.describe import bundle_facts

    return bundle_facts(open_bundle(path))


def _print_path(path: Path) -> None:
    """The name's own bytes: a file name need not be text."""
    typer.echo(os.fsencode(path))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


@contextmanager
def _progress(quiet: bool) -> Iterator[Report]:
    """A bar on a terminal; elsewhere one line for each new `what`; our log's lines in both."""
    log = logging.getLogger("sdengine")
    handler = _ToStderr()
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        if quiet:
            yield lambda what, done, total: None
        elif sys.stderr.isatty():
            with _bars() as report:
                yield report
        else:
            yield _one_line_each()
    finally:
        log.removeHandler(handler)


def _one_line_each() -> Report:
    seen: set[str] = set()

    def report(what: str, done: float, total: float) -> None:
        if what not in seen:
            seen.add(what)
            _say(what)

    return report


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bars:
        bar = bars.add_task("", total=None)

        def report(what: str, done: float, total: float) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        yield report
