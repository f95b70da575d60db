"""Which device a worker runs on: a worker of an NVIDIA GPU sees that one alone.

checked by  tests/http/test_place.py
"""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.errors import RequestError

SEEN = "CUDA_VISIBLE_DEVICES"


def read_devices(text: str | None) -> tuple[str, ...]:
    """`cuda:0,cuda:1`, a worker each; none: what the backend takes itself. Raises RequestError."""
    if text is None:
        return ()
    devices = tuple(part.strip() for part in text.split(","))
    if not all(devices):
        raise RequestError(
            f"--device {text!r} names no device between two commas",
            hint="one for each worker, for instance --device cuda:0,cuda:1",
        )
    return devices


def placed(device: str | None, environ: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """What to add to a worker's environment, and what the device is called inside it.

    Another GPU's memory is not touched, not even by a probe: the process knows of one GPU, its
    first. Numbers count what we see ourselves.
    raises      RequestError: a number beyond those
    """
    kind, _, number = ("", "", "") if device is None else device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        return {}, device
    seen = environ.get(SEEN)
    known = None if seen is None else [name.strip() for name in seen.split(",") if name.strip()]
    if known is not None and int(number) >= len(known):
        raise RequestError(
            f"there is no {device}: {SEEN}={seen} leaves {len(known)} of them",
            hint=f"name others with --device, or change {SEEN}",
        )
    return {SEEN: number if known is None else known[int(number)]}, "cuda:0"
