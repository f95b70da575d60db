"""Records k-diffusion's samplers on a small fixed network: tests/golden/data/k_diffusion.json.

Not a test. In an environment with k-diffusion 0.1.1.post1, torchsde and torchdiffeq:
    python tests/golden/record_k_diffusion.py tests/golden/data/k_diffusion.json
Everything is float64. The noises are drawn here and handed in; between which levels k-diffusion
asked for each is recorded too.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

SAMPLERS = {
    "euler": "sample_euler", "euler_a": "sample_euler_ancestral", "heun": "sample_heun",
    "dpm2": "sample_dpm_2", "dpm2_a": "sample_dpm_2_ancestral", "lms": "sample_lms",
    "dpmpp_2s_a": "sample_dpmpp_2s_ancestral", "dpmpp_sde": "sample_dpmpp_sde",
    "dpmpp_2m": "sample_dpmpp_2m", "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
}  # fmt: skip
OPTIONS = {"dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
           "dpmpp_3m_sde_eta_0.4": ("dpmpp_3m_sde", {"eta": 0.4}),
           "euler_a_eta_0.4": ("euler_a", {"eta": 0.4})}  # fmt: skip
STEPS, WIDTH = 15, 6
LEVELS = (0.0292, 14.61)


def main(out: Path) -> None:
    import torch
    from k_diffusion import sampling

    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(2024)
    weights = (rng.standard_normal((WIDTH, WIDTH)) / 4).round(6)
    noises = rng.standard_normal((2 * STEPS, WIDTH)).round(6)
    start = rng.standard_normal(WIDTH).round(6)
    sigmas = sampling.get_sigmas_karras(STEPS, *LEVELS)
    made = {
        "weights": weights,
        "noises": noises,
        "start": start,
        "karras": sigmas,
        "exponential": sampling.get_sigmas_exponential(STEPS, *LEVELS),
    }
    matrix = torch.from_numpy(weights)
    runs = {}
    for name, (base, options) in {**{n: (n, {}) for n in SAMPLERS}, **OPTIONS}.items():
        fed, asked = [], []

        def denoised(x, sigma, fed=fed):
            """x0 = x - sigma eps, eps = tanh(W z) + z / 2 for what a network eats, z."""
            z = x / torch.sqrt(sigma[:, None] ** 2 + 1)
            fed.append(z[0].tolist())
            return x - sigma[:, None] * (torch.tanh(z @ matrix.T) + z / 2)

        def noise(before, after, asked=asked):
            asked.append([float(before), float(after)])
            return torch.from_numpy(noises[len(asked) - 1])[None]

        x = torch.from_numpy(start)[None] * sigmas[0]
        stochastic = any(part in base for part in ("_a", "sde"))
        options = {**options, **({"noise_sampler": noise} if stochastic else {})}
        end = getattr(sampling, SAMPLERS[base])(denoised, x, sigmas, disable=True, **options)
        runs[name] = {"fed": [*fed, end[0].tolist()], "noise_between": asked}
    about = {"command": "python tests/golden/record_k_diffusion.py", "k-diffusion": "0.1.1.post1",
             "torch": version("torch")}  # fmt: skip
    lists = {k: v.tolist() for k, v in made.items()}
    out.write_text(json.dumps({"about": about, **lists, "runs": runs}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
