"""A diffusers folder as optimum-intel exports it: `python make_openvino.py FOLDER OUT PRECISION`.

PRECISION   fp16      weights in float16, the default of a model this size
            int8      8-bit weights (`optimum-cli export openvino --weight-format int8`)
            hybrid    UNet: int8 activations for convolutions, 8-bit weights for the rest
            full      UNet: weights and activations in int8
Runs in the peer's environment. hybrid and full record the UNet's inputs in runs on PROMPTS.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.modules.setdefault("openvino_telemetry", None)

PROMPTS = ("a slice of pizza", "a fox in the snow", "an astronaut riding a horse", "a red heart",
           "a lighthouse at night", "portrait of an old sailor", "a bowl of fruit, oil on canvas",
           "a city street in the rain")  # fmt: skip
SAMPLES = 16  # recorded calls of the UNet: each costs a call in float32


def main(source: Path, out: Path, precision: str) -> None:
    if precision in ("fp16", "int8"):
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        options = ["--model", str(source), "--task", "text-to-image", "--weight-format", precision]
        subprocess.run([*command, *options, str(out)], check=True)
        return
    from optimum.intel import (
        OVHybridQuantizationConfig,
        OVPipelineQuantizationConfig,
        OVQuantizationConfig,
        OVStableDiffusionPipeline,
        OVWeightQuantizationConfig,
    )

    weights = OVWeightQuantizationConfig(bits=8)
    shared = {"dataset": list(PROMPTS), "num_samples": SAMPLES}
    unet = {
        "hybrid": lambda: OVHybridQuantizationConfig(
            OVWeightQuantizationConfig(bits=8), OVQuantizationConfig(bits=8)
        ),
        "full": lambda: OVQuantizationConfig(bits=8),
    }[precision]()
    parts = {"unet": unet, "vae_decoder": weights, "vae_encoder": weights, "text_encoder": weights}
    config = OVPipelineQuantizationConfig(quantization_configs=parts, **shared)
    pipe = OVStableDiffusionPipeline.from_pretrained(
        source, export=True, quantization_config=config
    )
    pipe.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
