"""Seeded noise: one stream for each image, so that its picture does not depend on the batch.

`torch` re-makes the CPU generator of PyTorch without PyTorch; `numpy` is what the reference's
inpainting and upscaling scripts draw from; both stand on MT19937 with its classic seeding.
`philox` is what PyTorch draws on a CUDA device, and AUTOMATIC1111 as its source "NV". A variation
is the start noise of one seed turned towards that of another.

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
from .philox import philox4x32
from .ports import Array, Floats

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


class PhiloxNoise:
    """What `torch.randn(shape, device="cuda")` gives after `torch.manual_seed(seed)`.

    One counter for each element and draw, and one value from each: so it is on a device as long as
    it has a thread for each element, which it has for latents of usual pictures. Computed in double
    precision, as AUTOMATIC1111's source "NV" does; a device's float32 was seen 6e-7 away from it.

    raises   RequestError for a seed outside 0 .. 2**32 - 1
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._draws = check_seed(seed), 0

    def normal(self, shape: Sequence[int]) -> Floats:
        """float32 of `shape`, in C order."""
        draw, zero = np.array([self._draws], np.uint64), np.zeros(1, np.uint64)
        place = np.arange(math.prod(shape), dtype=np.uint64)
        height, turn, *_ = philox4x32((draw, zero, place, zero), (self._seed, 0))
        self._draws += 1
        radius = np.sqrt(-2.0 * np.log((height + 0.5) * 2.0**-32))
        out = radius * np.sin((turn + 0.5) * (2.0 * math.pi * 2.0**-32))
        return np.asarray(out, np.float32).reshape(tuple(shape))

    def snapshot(self) -> dict[str, Any]:
        return {"kind": "philox", "seed": self._seed, "draws": self._draws}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises RequestError for a state that is not one of `snapshot`'s."""
        numbers = [state.get("seed"), state.get("draws")]
        words = all(type(n) is int and 0 <= n <= MAX_SEED for n in numbers)
        if state.get("kind") != "philox" or not words:
            raise _foreign("philox", state)
        self._seed, self._draws = state["seed"], state["draws"]


class VariedNoise:
    """The first draw of `main`, turned towards the first of `other`; then `main` alone.

    strength    0 is main's own noise, 1 the other's
    raises      RequestError for a strength outside 0..1
    """

    def __init__(self, main: NoiseStream, other: NoiseStream, strength: float) -> None:
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not number or not 0.0 <= strength <= 1.0:
            raise RequestError(
                f"variation strength {strength!r}: expected a number from 0 to 1",
                hint="give --variation-strength 0 (this seed) to 1 (the variation's seed)",
            )
        self._main, self._other = main, other
        self._strength, self._drawn = float(strength), False

    def normal(self, shape: Sequence[int]) -> Floats:
        """float32 of `shape`, in C order."""
        own = self._main.normal(shape)
        if self._drawn:
            return own
        self._drawn = True
        return slerp(own, self._other.normal(shape), self._strength)

    def snapshot(self) -> dict[str, Any]:
        streams = {"main": self._main.snapshot(), "other": self._other.snapshot()}
        return {"kind": "varied", "strength": self._strength, "drawn": self._drawn, **streams}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises RequestError for a state that is not one of `snapshot`'s."""
        parts = state.get("main"), state.get("other")
        facts = state.get("kind"), state.get("strength"), type(state.get("drawn"))
        if facts != ("varied", self._strength, bool) or not all(isinstance(p, dict) for p in parts):
            raise _foreign("varied", state)
        before = self._main.snapshot()
        self._main.restore(state["main"])
        try:
            self._other.restore(state["other"])
        except RequestError:
            self._main.restore(before)
            raise
        self._drawn = state["drawn"]


def slerp(start: Array, end: Array, part: float) -> Floats:
    """From `start` (part 0) to `end` (part 1) along the arc between them, float32.

    The vectors are those along axis 1, so the columns of each channel of a latent [C, h, w], as
    AUTOMATIC1111 has it (of an array of one axis: the whole). Where two are nearly parallel or
    opposed the arc is not defined well, and the straight line takes its place.

    source      Shoemake 1985, "Animating rotation with quaternion curves", section 3.3
    """
    axis = min(1, start.ndim - 1)
    a, b = start.astype(np.float64), end.astype(np.float64)
    lengths = np.sqrt(_dot(a, a, axis) * _dot(b, b, axis))
    cosine = _dot(a, b, axis) / np.where(lengths == 0, 1, lengths)
    straight = np.abs(cosine) > NEARLY_PARALLEL
    angle = np.where(straight, 1.0, np.arccos(np.clip(cosine, -1.0, 1.0)))
    near = np.where(straight, 1.0 - part, np.sin((1.0 - part) * angle) / np.sin(angle))
    far = np.where(straight, part, np.sin(part * angle) / np.sin(angle))
    return np.asarray(near * a + far * b, np.float32)


def _dot(a: Array, b: Array, axis: int) -> Array:
    return np.asarray((a * b).sum(axis=axis, keepdims=True))


NEARLY_PARALLEL = 0.9995  # cosine

KINDS: Mapping[str, Callable[[int], NoiseStream]] = {
    "torch": TorchNoise,
    "numpy": NumpyNoise,
    "philox": PhiloxNoise,
}


def noise_stream(
    kind: str, seed: int, variation_seed: int | None = None, strength: float = 0.0
) -> NoiseStream:
    """A fresh stream; with a variation seed, one whose first draw is turned towards that seed's.

    raises      UnknownName; RequestError for a seed, and for a strength outside 0..1
    """
    if kind not in KINDS:
        raise UnknownName("noise", kind, KINDS)
    own = KINDS[kind](seed)
    if variation_seed is None:
        return own
    return VariedNoise(own, KINDS[kind](variation_seed), strength)


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
        raise _foreign(kind, state)
    return key.astype(np.uint32), pos, spare


def _foreign(kind: str, state: Mapping[str, Any]) -> RequestError:
    return RequestError(
        f"the saved place is not one of a {kind!r} noise stream: "
        f"found kind {state.get('kind')!r} with {', '.join(sorted(state))}",
        hint="resume with the noise kind that the run was begun with, or start anew",
    )
