"""ModelFacts from what the tensors show, what configs state and what the family has in common.

checked by  tests/unit/checkpoint/test_facts.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..engine.bundle import (
    LatentFacts,
    ModelFacts,
    Prediction,
    ScheduleFacts,
    SourceFacts,
    TokenizerFacts,
    Variant,
)
from ..engine.errors import BadConfig, UnknownFact, UnknownName
from .companions import image_facts, low_scale_facts
from .containers import TensorRef
from .probe import probe
from .stated import PREDICTIONS, Stated
from .variants import FAMILIES

# The CLIP vocabulary: its last two ids are start and end; Stable Diffusion 2 pads with 0.
_PAD = 0
_TOLERANCE = {"F32": 1e-5, "F64": 1e-5, "F16": 2e-3, "BF16": 1e-2}
_PASS = "pass the right config with --config FILE, or move the one beside the model away"


def decide_prediction(
    option: str | None,
    stated: Stated,
    variant: Variant,
    tensors: Mapping[str, TensorRef],
    unet: Mapping[str, Any],
) -> tuple[Prediction, str]:
    """eps or v, and what decided it: an option, a config, the family, or the probe.

    raises      UnknownName for an option that is neither
    """
    if option is not None:
        if option not in PREDICTIONS:
            raise UnknownName("prediction", option, PREDICTIONS)
        return _kind(PREDICTIONS[option]), "the option"
    if stated.prediction is not None:
        return _kind(stated.prediction), str(stated.prediction_from)
    family = FAMILIES[variant].prediction
    if family is not None:
        return family, f"all published {variant} models"
    found, shift = probe(tensors, unet)
    return found, f"the probe (mean of output - input {shift:.2f}; below -1 means v)"


def _kind(name: str) -> Prediction:
    return "v" if name == "v" else "eps"


def schedule_facts(
    stated: Stated, variant: Variant, tensors: Mapping[str, TensorRef]
) -> ScheduleFacts:
    """The training betas, from a config, else the file's own buffer, else the family.

    raises      BadConfig where a config and the buffer differ, UnknownFact for betas of another law
    """
    family = FAMILIES[variant]
    start = family.beta_start if stated.beta_start is None else stated.beta_start
    end = family.beta_end if stated.beta_end is None else stated.beta_end
    steps = 1000 if stated.timesteps is None else stated.timesteps
    if not 0 < start < end < 1 or steps < 2:
        raise BadConfig(
            f"{stated.where} states {steps} betas from {start} to {end}, "
            "expected 0 < start < end < 1",
            hint=_PASS,
        )
    buffer = tensors.get("betas")
    if buffer is None or buffer.dtype not in _TOLERANCE:
        return ScheduleFacts("scaled_linear", start, end, steps)
    betas = buffer.torch().double().numpy()
    if _close(betas, start, end, steps, buffer.dtype):
        return ScheduleFacts("scaled_linear", start, end, steps)
    shown = f"the file's own: {betas.size} from {betas[0]:.6g} to {betas[-1]:.6g}"
    if stated.beta_start is not None or stated.beta_end is not None or stated.timesteps is not None:
        raise BadConfig(
            f"{stated.where} states {steps} betas from {start} to {end}; {shown}", hint=_PASS
        )
    start, end, steps = float(f"{betas[0]:.6g}"), float(f"{betas[-1]:.6g}"), betas.size
    if not 0 < start < end < 1 or not _close(betas, start, end, steps, buffer.dtype):
        raise UnknownFact(
            f"the betas follow a law that is not known here ({shown}, not linear in the root)",
            hint="Stable Diffusion 2 models have scaled-linear betas; zero-terminal-SNR and "
            "cosine schedules are not supported",
        )
    return ScheduleFacts("scaled_linear", start, end, steps)


def _close(betas: Any, start: float, end: float, steps: int, dtype: str) -> bool:
    want = np.linspace(start**0.5, end**0.5, steps) ** 2
    return betas.shape == want.shape and bool(
        np.allclose(betas, want, rtol=_TOLERANCE[dtype], atol=0.0)
    )


def _companion_facts(
    variant: Variant,
    stated: Stated,
    configs: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, TensorRef],
) -> dict[str, Any]:
    if variant == "x4-upscaler":
        said = stated.low_scale
        buffer = tensors.get("low_scale_model.betas")
        small = replace(
            stated,
            beta_start=said.get("beta_start"),
            beta_end=said.get("beta_end"),
            timesteps=said.get("timesteps"),
        )
        schedule = schedule_facts(small, variant, {} if buffer is None else {"betas": buffer})
        return {"low_scale": low_scale_facts(schedule, said, schedule.timesteps)}
    if "image_encoder" in configs:
        tower = configs["image_encoder"]
        return {"image_conditioning": image_facts(tower, tensors, stated.noise_timesteps)}
    return {}


def model_facts(
    *,
    name: str,
    variant: Variant,
    prediction: Prediction,
    schedule: ScheduleFacts,
    stated: Stated,
    configs: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, TensorRef],
    licence: str | None,
    source: SourceFacts,
) -> ModelFacts:
    """Raises BadConfig for a scale, a size or a level that cannot be, UnknownFact for a noise
    schedule of another law."""
    vae, text, unet = configs["vae"], configs["text"], configs["unet"]
    factor = 2 ** (len(vae["ch_mult"]) - 1)
    scale = FAMILIES[variant].scale if stated.scale is None else stated.scale
    if not 1e-6 <= scale <= 1e6:
        raise BadConfig(f"{stated.where} states a latent scale of {scale}", hint=_PASS)
    side = FAMILIES[variant].native[prediction]
    if stated.image_size is not None:
        side = stated.image_size * factor
    multiple = 2 ** (len(unet["channel_mult"]) - 1)
    if side < 1 or side % (factor * multiple):
        raise BadConfig(
            f"{stated.where} states pictures of {side} pixels, expected a multiple of "
            f"{factor * multiple}",
            hint=_PASS,
        )
    return ModelFacts(
        name=name,
        variant=variant,
        prediction=prediction,
        schedule=schedule,
        latent=LatentFacts(vae["embed_dim"], scale, factor, multiple),
        native_size=(side, side),
        tokenizer=TokenizerFacts(
            start=text["vocab_size"] - 2,
            end=text["vocab_size"] - 1,
            pad=_PAD if stated.pad is None else stated.pad,
            length=text["context_length"],
        ),
        licence=stated.licence or licence or "not stated in the model's files",
        source=source,
        **_companion_facts(variant, stated, configs, tensors),
    )
