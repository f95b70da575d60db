"""A pipeline as optimum-intel exports it: `python make_openvino.py FOLDER OUT PRECISION`.

PRECISION   fp16      weights in float16, the default of a model this size
            int8      8-bit weights (`optimum-cli export openvino --weight-format int8`)
            hybrid    UNet: activations of convolutions in int8, 8-bit weights for the rest
            full      UNet: weights and activations in int8
FOLDER      of diffusers for the first two, else what `fp16` made
Runs in the peer's environment. hybrid and full record the UNet's inputs in a run of its own: by
name, optimum-intel's calibration sets come from the network, and their runs are of 50 steps.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

sys.modules.setdefault("openvino_telemetry", None)

PROMPT = "an astronaut riding a horse in the snow"
# Recorded calls of the UNet, and the sides of their picture. The quantiser keeps what every node
# gives: 19 GB and more at 512x512, which machines of this size do not have. Speed does not depend
# on the samples, and on random weights there is no quality to win.
SAMPLES, SIDE = 4, 256


def main(source: Path, out: Path, precision: str) -> None:
    if precision in ("fp16", "int8"):
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        options = ["--model", str(source), "--task", "text-to-image", "--weight-format", precision]
        subprocess.run([*command, *options, str(out)], check=True)
        return
    import nncf
    from optimum.intel import (
        OVConfig,
        OVPipelineQuantizationConfig,
        OVQuantizationConfig,
        OVQuantizer,
        OVStableDiffusionPipeline,
        OVWeightQuantizationConfig,
    )
    from optimum.intel.openvino.quantization import InferRequestWrapper, OVCalibrationDataset

    pipe = OVStableDiffusionPipeline.from_pretrained(source)
    calls: list[object] = []
    pipe.compile()
    plain = pipe.unet.request
    pipe.unet.request = InferRequestWrapper(plain, calls)
    pipe(PROMPT, height=SIDE, width=SIDE, num_inference_steps=SAMPLES, output_type="latent")
    pipe.unet.request = plain
    pipe.clear_requests()  # compiled networks: the quantiser needs their memory

    unet = {
        "hybrid": lambda: OVWeightQuantizationConfig(bits=8, quant_method="hybrid"),
        "full": lambda: OVQuantizationConfig(bits=8),
    }[precision]()
    unet.num_samples = SAMPLES
    config = OVPipelineQuantizationConfig(
        {"unet": unet}, default_config=OVWeightQuantizationConfig(bits=8)
    )
    dataset = OVCalibrationDataset({"unet": nncf.Dataset(calls[:SAMPLES])})
    OVQuantizer(pipe).quantize(
        ov_config=OVConfig(quantization_config=config),
        calibration_dataset=dataset,
        save_directory=str(out),
    )
    for path in (source / "tokenizer").iterdir():  # genai's own tokenizer lies beside the usual one
        if not (out / "tokenizer" / path.name).exists():
            shutil.copy(path, out / "tokenizer" / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
