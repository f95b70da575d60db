"""stable-diffusion.cpp on the processor: a worker of the line protocol, in its own environment."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import protocol  # found beside this file, whatever `-P` leaves out

sys.path.pop(0)

SAMPLERS = {"ddim": "ddim_trailing", "dpmpp_2m": "dpm++2m", "euler": "euler"}


class Steps:
    """Seconds of each step by our own clock: theirs begins with a step 0 of no time."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rows: list[float] = []
        self.last: float | None = None

    def __call__(self, step: int, steps: int, seconds: float) -> None:
        if steps != self.steps:  # loading and decoding in tiles report here too
            return
        now = time.perf_counter()
        if self.last is not None and step > 0:
            self.rows.append(now - self.last)
        self.last = now


class StableDiffusionCpp:
    def load(self, options: dict[str, Any], **_: Any) -> dict[str, Any]:
        """options: model (a checkpoint file), wtype, conv_direct, threads"""
        start = time.perf_counter()
        from importlib.metadata import version

        from stable_diffusion_cpp import StableDiffusion

        # its own default is half of the processors
        visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        threads = options.get("threads") or visible or os.cpu_count()
        direct = bool(options.get("conv_direct"))
        self.model = StableDiffusion(
            model_path=options["model"],
            wtype=options["wtype"],
            n_threads=threads,
            flash_attn=True,
            diffusion_flash_attn=True,
            diffusion_conv_direct=direct,
            vae_conv_direct=direct,
            vae_decode_only=True,
            verbose=False,
        )
        about = {
            "stable-diffusion-cpp-python": version("stable-diffusion-cpp-python"),
            "threads": threads,
            "wtype": options["wtype"],
        }
        return {"seconds": time.perf_counter() - start, "about": about}

    def run(self, request: dict[str, Any], picture: str | None = None) -> dict[str, Any]:
        clock = Steps(request["steps"])

        start = time.perf_counter()
        images = self.model.generate_image(
            request["prompt"],
            negative_prompt=request.get("negative_prompt", ""),
            width=request["width"],
            height=request["height"],
            cfg_scale=request["guidance"],
            sample_method=SAMPLERS[request["sampler"]],
            sample_steps=request["steps"],
            seed=request["seed"],
            progress_callback=clock,
        )
        seconds = time.perf_counter() - start
        if picture is not None:
            import numpy as np

            protocol.keep_picture(picture, np.asarray(images[0]))
        return {"seconds": seconds, "rows": clock.rows}


if __name__ == "__main__":
    peer = StableDiffusionCpp()
    protocol.serve({"load": peer.load, "run": peer.run})
