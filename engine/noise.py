"""Seeded noise: one stream for each image, so that its picture does not depend on the batch.

`torch` re-makes the CPU generator of PyTorch without PyTorch; `numpy` is what the reference's
inpainting and upscaling scripts draw from. Both stand on MT19937 with its classic seeding.

source      reference-spec 7.1
checked by  tests/unit/test_noise.py (published values; torch itself)
"""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, UnknownName
from .ports import Floats

MAX_SEED = 2**32 - 1


class NoiseStream(Protocol):
    """Standard normal numbers, one draw after the other.

    `snapshot` is plain JSON and, given to `restore` of a stream of the same kind, makes that one go
    on at the same place.
    """

    def normal(self, shape: Sequence[int]) -> Floats: ...

    def snapshot(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class TorchNoise:
    """What `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` gives on a CPU.

    The uniform numbers are the same exactly; the values differ from those of torch's vectorised
    kernels by less than 1e-6. (torch on a processor without AVX2 differs from torch on one with it
    by up to 3e-6: it rounds the angle elsewhere.)

    raises   RequestError for a seed outside 0 .. 2**32 - 1
    """

    def __init__(self, seed: int) -> None:
        self._words = _mt19937(seed)
        self._spare: float | None = None  # second half of the last pair that `_few` made

    def normal(self, shape: Sequence[int]) -> Floats:
        """float32 of `shape`, in C order."""
        count = math.prod(shape)
        return (self._few(count) if count < 16 else self._many(count)).reshape(tuple(shape))

    def _many(self, count: int) -> Floats:
        """16 or more: one uniform each, then Box-Muller in groups of 16."""
        uniform = self._uniform24(count)
        whole = count // 16 * 16
        out = np.empty(count, np.float32)
        out[:whole] = _box_muller16(uniform[:whole])
        if count != whole:  # the last 16, part of which are there already, are drawn anew
            out[-16:] = _box_muller16(self._uniform24(16))
        return out

    def _few(self, count: int) -> Floats:
        """Fewer than 16: one at a time in double precision; every other one is kept back."""
        out = np.empty(count, np.float32)
        for i in range(count):
            if self._spare is not None:
                out[i], self._spare = self._spare, None
                continue
            turn, height = self._uniform53(), self._uniform53()
            radius = math.sqrt(-2.0 * math.log1p(-height))
            out[i] = radius * math.cos(2.0 * math.pi * turn)
            self._spare = radius * math.sin(2.0 * math.pi * turn)
        return out

    def _uniform24(self, count: int) -> Floats:
        """float32 [count] in 0 .. 1, without 1: the low 24 bits of one word each."""
        low = self._raw(count) & np.uint32(0xFFFFFF)
        return low.astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._raw(2))
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)

    def _raw(self, count: int) -> NDArray[np.uint32]:
        return self._words.randint(0, 2**32, size=count, dtype=np.uint32)

    def snapshot(self) -> dict[str, Any]:
        state = self._words.get_state(legacy=False)["state"]
        return _saved("torch", state, self._spare)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises RequestError for a state that is not one of `snapshot`'s."""
        key, pos, self._spare = _parsed("torch", state)
        self._words.set_state(("MT19937", key, pos, 0, 0.0))


class NumpyNoise:
    """What `numpy.random.RandomState(seed).randn(*shape)` gives, rounded to float32.

    raises   RequestError for a seed outside 0 .. 2**32 - 1
    """

    def __init__(self, seed: int) -> None:
        self._words = _mt19937(seed)

    def normal(self, shape: Sequence[int]) -> Floats:
        """float32 of `shape`, in C order."""
        return self._words.standard_normal(tuple(shape)).astype(np.float32)

    def snapshot(self) -> dict[str, Any]:
        state = self._words.get_state(legacy=False)
        return _saved("numpy", state["state"], state["gauss"] if state["has_gauss"] else None)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises RequestError for a state that is not one of `snapshot`'s."""
        key, pos, spare = _parsed("numpy", state)
        gauss = (0, 0.0) if spare is None else (1, spare)
        self._words.set_state(("MT19937", key, pos, *gauss))


KINDS: Mapping[str, Callable[[int], NoiseStream]] = {"torch": TorchNoise, "numpy": NumpyNoise}


def noise_stream(kind: str, seed: int) -> NoiseStream:
    """A fresh stream. Raises UnknownName, or RequestError for the seed."""
    if kind not in KINDS:
        raise UnknownName("noise", kind, KINDS)
    return KINDS[kind](seed)


def check_seed(seed: int) -> int:
    """The seed as a plain int. Raises RequestError outside 0 .. 2**32 - 1; never wraps."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number <= MAX_SEED:
        raise RequestError(
            f"seed {seed!r} cannot be used: expected a whole number from 0 to {MAX_SEED}",
            hint=f"give a seed from 0 to {MAX_SEED}",
        )
    return number


def _box_muller16(uniform: Floats) -> Floats:
    """float32 [16 k] -> float32 [16 k]: in each group 8 radii, then 8 angles.

    The angle is rounded to float32 as torch's kernel does (that is worth 1e-6); the rest is in
    double precision.
    """
    groups = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2.0 * np.log(1.0 - groups[:, 0].astype(np.float64)))
    angle = (np.float32(2.0 * math.pi) * groups[:, 1]).astype(np.float64)
    out = np.empty(groups.shape, np.float32)
    out[:, 0] = radius * np.cos(angle)
    out[:, 1] = radius * np.sin(angle)
    return out.reshape(-1)


def _mt19937(seed: int) -> np.random.RandomState:
    # numpy's new Generator seeds otherwise: the classic seeding is the whole point here.
    return np.random.RandomState(check_seed(seed))


def _saved(kind: str, state: Mapping[str, Any], spare: float | None) -> dict[str, Any]:
    key = base64.b64encode(np.asarray(state["key"], "<u4").tobytes()).decode("ascii")
    return {"kind": kind, "key": key, "pos": int(state["pos"]), "spare": spare}


def _parsed(kind: str, state: Mapping[str, Any]) -> tuple[NDArray[np.uint32], int, float | None]:
    """key uint32 [624], place in it, the number kept back."""
    try:
        key = np.frombuffer(base64.b64decode(state["key"], validate=True), "<u4")
        pos, spare = int(state["pos"]), state["spare"]
        spare = None if spare is None else float(spare)
        good = state["kind"] == kind and key.shape == (624,) and 0 <= pos <= 624
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise RequestError(
            f"the saved place is not one of a {kind!r} noise stream: "
            f"found kind {state.get('kind')!r} with {', '.join(sorted(state))}",
            hint="resume with the noise kind that the run was begun with, or start anew",
        )
    return key.astype(np.uint32), pos, spare
