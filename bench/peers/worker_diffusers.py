"""diffusers on the processor, as a worker of the line protocol. Runs in the peer's environment."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import protocol  # found beside this file, whatever `-P` leaves out

sys.path.pop(0)

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}


class Diffusers:
    def load(self, options: dict[str, Any], **_: Any) -> dict[str, Any]:
        """options: model (a diffusers folder), dtype, compiled, threads"""
        start = time.perf_counter()
        import diffusers
        import torch

        if options.get("threads") is not None:
            torch.set_num_threads(options["threads"])
        dtype = getattr(torch, options["dtype"])
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            options["model"], torch_dtype=dtype, local_files_only=True, safety_checker=None
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        if options.get("compiled"):
            pipe.unet.compile()
            pipe.vae.decode = torch.compile(pipe.vae.decode)
        self.pipe, self.torch, self.diffusers = pipe, torch, diffusers
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        return {
            "seconds": time.perf_counter() - start,
            "about": {**versions, "threads": torch.get_num_threads(), "dtype": options["dtype"]},
        }

    def run(self, request: dict[str, Any], picture: str | None = None) -> dict[str, Any]:
        name, extra = SCHEDULERS[request["sampler"]]
        config = self.pipe.scheduler.config
        self.pipe.scheduler = getattr(self.diffusers, name).from_config(config, **extra)
        rows: list[float] = []
        last = [0.0]

        def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            now = time.perf_counter()
            rows.append(now - last[0])
            last[0] = now
            return values

        generator = self.torch.Generator().manual_seed(request["seed"])
        with self.torch.inference_mode():
            start = last[0] = time.perf_counter()
            result = self.pipe(
                request["prompt"],
                negative_prompt=request.get("negative_prompt", ""),
                width=request["width"],
                height=request["height"],
                num_inference_steps=request["steps"],
                guidance_scale=request["guidance"],
                generator=generator,
                callback_on_step_end=on_step,
                output_type="np",
            )
            seconds = time.perf_counter() - start
        protocol.keep_picture(picture, (result.images[0] * 255).round())
        # the first of these holds the text encoder too: what is left is what repeats
        return {"seconds": seconds, "rows": rows[1:]}


if __name__ == "__main__":
    peer = Diffusers()
    protocol.serve({"load": peer.load, "run": peer.run})
