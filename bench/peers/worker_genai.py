"""openvino-genai on the processor: a worker of the line protocol, in its own environment."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import protocol  # found beside this file, whatever `-P` leaves out

sys.path.pop(0)
sys.modules.setdefault("openvino_telemetry", None)  # its import would send an event

SCHEDULERS = {"ddim": "DDIM", "euler": "EULER_DISCRETE", "plms": "PNDM"}


class GenAI:
    """Reshaped to a fixed size before it is compiled, which its documentation advises: so the
    first run decides on the size, and loading ends there."""

    def load(self, options: dict[str, Any], request: dict[str, Any], **_: Any) -> dict[str, Any]:
        """options: model (a folder that optimum-intel exported), threads
        request: of the runs to come; its size and guidance are compiled in"""
        start = time.perf_counter()
        import openvino_genai as genai

        pipe = genai.Text2ImagePipeline(options["model"])
        kind = getattr(genai.Scheduler.Type, SCHEDULERS[request["sampler"]])
        config = os.path.join(options["model"], "scheduler", "scheduler_config.json")
        pipe.set_scheduler(genai.Scheduler.from_config(config, kind))
        pipe.reshape(1, request["height"], request["width"], request["guidance"])
        threads = options.get("threads")
        settings = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        pipe.compile("CPU", **settings)
        self.genai, self.pipe = genai, pipe
        about = {"openvino-genai": genai.__version__, **settings}
        return {"seconds": time.perf_counter() - start, "about": about}

    def run(self, request: dict[str, Any], picture: str | None = None) -> dict[str, Any]:
        start = time.perf_counter()
        result = self.pipe.generate(
            request["prompt"],
            negative_prompt=request.get("negative_prompt", ""),
            width=request["width"],
            height=request["height"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            generator=self._noise(request["seed"]),
        )
        seconds = time.perf_counter() - start
        protocol.keep_picture(picture, result.data[0])
        raw = self.pipe.get_performance_metrics().raw_metrics
        return {"seconds": seconds, "rows": [float(t) / 1e6 for t in raw.iteration_durations]}

    def _noise(self, seed: int) -> Any:
        """torch's noise, which is ours and diffusers' too, where torch lies beside it."""
        try:
            return self.genai.TorchGenerator(seed)
        except Exception as error:
            sys.stderr.write(f"no torch generator: {error}\n")
            return self.genai.CppStdGenerator(seed)


if __name__ == "__main__":
    peer = GenAI()
    protocol.serve({"load": peer.load, "run": peer.run})
