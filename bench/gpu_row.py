"""One row of a GPU visit, in a process of its own: a job as JSON on stdin, a row on stdout."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import SdengineError


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """One of our backends, at a precision that this bundle need not have been proved in."""
    from .. import api
    from ..engine.bundle import open_bundle
    from ..engine.pipeline import Pipeline

    start = time.perf_counter()
    backend = backend_of(job["backend"], job["rehearse"])
    bundle = open_bundle(Path(job["models"]["bundle"]))
    sessions = api.EngineSessions(bundle, backend, job["precision"], None)
    times: dict[str, list[float]] = {name: [] for name in ("total_s", "text_s", "denoise_s",
                                                           "decode_s", "enqueue_s")}  # fmt: skip
    macs = bundle.components["unet"].graphs["full"].macs
    with Pipeline(bundle, sessions, {}) as pipe:
        first = time.perf_counter()
        result = pipe(**job["request"])
        first_s = time.perf_counter() - first
        for index in range(job["runs"] + 3):
            stamps: list[float] = []

            def on_step(_: object, stamps: list[float] = stamps) -> None:
                stamps.append(time.perf_counter())

            result = pipe(**job["request"], on_step=on_step)
            if index < 3:  # the captures come in the first calls
                continue
            timings = result.timings
            times["total_s"].append(timings.total)
            times["text_s"].append(timings.text)
            times["denoise_s"].append(timings.denoise)
            times["decode_s"].append(timings.decode)
            times["enqueue_s"] += [b - a for a, b in itertools.pairwise(stamps)]
        picture = np.asarray(result.images[0])
    row = {name: summary(values) for name, values in times.items() if values}
    rows = len(result.timings.rows)
    batch, halves = job["request"]["batch_size"], 1 if job["request"]["guidance"] == 1.0 else 2
    step = statistics.median(times["denoise_s"]) / rows
    about = {"step_s": step, "first_s": first_s, "ready_s": first - start}
    if macs is not None:
        native = bundle.facts.native_size[0] * bundle.facts.native_size[1]
        share = job["request"]["width"] * job["request"]["height"] / native
        about["step_flops"] = 2 * macs * halves * batch * share / step  # convolutions' growth
    return {**row, **about, "backend": backend.probe().reason, "picture": picture}


def backend_of(name: str, rehearse: bool) -> Any:
    """In a rehearsal torch's backend runs on the processor."""
    from .. import backends

    if rehearse and name == "torch-cuda":
        from ..backends.torch_cuda import TorchCuda

        return TorchCuda("cpu")
    return backends.get(name)


def diffusers(job: dict[str, Any]) -> dict[str, Any]:
    """The peer: eager, or UNet and decoder compiled, as its documentation has it for speed."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if job["models"].get("diffusers") is None:
        raise FileNotFoundError("no diffusers folder was made")
    start = time.perf_counter()
    rehearse = job["rehearse"]
    dtype, place = (torch.float32, "cpu") if rehearse else (torch.float16, "cuda")
    pipe = StableDiffusionPipeline.from_pretrained(
        job["models"]["diffusers"], torch_dtype=dtype, local_files_only=True, safety_checker=None,
    ).to(place)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if job["options"].get("compiled"):
        # with CUDA graphs; "max-autotune" compiles for longer than a row may take
        mode = "default" if rehearse else "reduce-overhead"
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, mode=mode)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, mode=mode)
    asked = job["request"]

    def once() -> float:
        generator = torch.Generator("cpu").manual_seed(asked["seed"])
        begin = time.perf_counter()
        pipe(
            asked["prompt"], width=asked["width"], height=asked["height"],
            num_inference_steps=asked["steps"], guidance_scale=asked["guidance"],
            num_images_per_prompt=asked["count"], generator=generator, output_type="pil",
        )  # fmt: skip
        return time.perf_counter() - begin

    ready = time.perf_counter() - start
    first = once()
    for _ in range(3):
        once()
    return {"total_s": summary([once() for _ in range(job["runs"])]), "first_s": first,
            "ready_s": ready, "picture": None}  # fmt: skip


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1],
            "n": len(ordered)}  # fmt: skip


def agreement(found: np.ndarray, folder: Path, reference: str) -> float | None:
    """PSNR in dB of a picture against the reference's, which ran before it; None: not there."""
    path = folder / f"{reference}.npy"
    if not path.is_file():
        return None
    error = np.mean((found.astype(float) - np.load(path).astype(float)) ** 2)
    return None if error == 0 else float(10 * np.log10(255.0**2 / error))


def memory() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_bytes_used": total - free, "torch_peak_bytes": torch.cuda.max_memory_allocated()}


def main() -> int:
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        row = diffusers(job) if job["backend"] is None else ours(job)
    except SdengineError as error:
        sys.stdout.write(json.dumps({"ok": False, "failed": error.message, "hint": error.hint}))
        return 0
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0] if lines else ''}"
        sys.stdout.write(json.dumps({"ok": False, "failed": said}))
        return 0
    picture = row.pop("picture")
    if picture is not None:
        row["psnr_db"] = agreement(picture, folder, job["reference"])
        np.save(folder / f"{job['label']}.npy", picture)
    sys.stdout.write("\n" + json.dumps({"ok": True, **row, **memory()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
