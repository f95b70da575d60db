"""A sampler found by search, as a JSON file. The format is in docs/samplers.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import RequestError
from ..levels import Doubles, Schedule, Training
from ..table import HISTORY, Prediction, Quantity, Table
from .rows import Rows, Weights

FORMAT = "sdengine-solver-1"
KEYS = {"format", "name", "quantity", "sigmas", "timesteps", "x", "m", "noise"}
QUANTITIES: dict[str, Quantity] = {"data": "data", "noise": "noise"}
HINT = "docs/samplers.md describes the format of a solver's file"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class CustomSolver:
    """Rows in the coordinates of rows.py, free of the model's prediction type.

    sigmas      [R+1]: level sigma / alpha of each row's latent, and of the last
    timesteps   [R]; None takes those of the levels
    x, m        [R, up to HISTORY]: weights of z_(i-k) and m_(i-k)
    noise       [R]: unit noise added to z
    """

    name: str
    quantity: Quantity
    sigmas: Doubles
    timesteps: Doubles | None
    x: Doubles
    m: Doubles
    noise: Doubles

    def table(self, training: Training, prediction: Prediction) -> Table:
        """Raises RequestError when the levels are not this model's."""
        low, high = 0.99 * training.ratios[0], 1.01 * training.ratios[-1]
        asked = self.sigmas[:-1]
        if asked.max() > high or asked.min() < low:
            raise RequestError(
                f"solver {self.name!r} has rows at levels {asked.min():g} to {asked.max():g};"
                f" this model knows {low:.4g} to {high:.4g}",
                hint="it was made for a model with other training levels",
            )
        alphas = 1.0 / np.sqrt(1.0 + self.sigmas**2)
        times, logs = training.clock
        t = np.interp(np.log(asked), logs, times) if self.timesteps is None else self.timesteps
        start = float(self.sigmas[0] * alphas[0])
        levels = Schedule(self.name, t, alphas, self.sigmas * alphas, start, training=training)
        rows = Rows(levels, self.quantity)
        for i in range(len(asked)):
            rows.at(i, x=_mapping(self.x[i]), m=_mapping(self.m[i]), noise=float(self.noise[i]))
        return rows.table(prediction)


def load(path: Path | str) -> CustomSolver:
    """Read and check a solver's file. Raises RequestError with the entry that is wrong."""
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(
            f"cannot read the solver {path}: {error.strerror}", hint="give the path of a JSON file"
        ) from None
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}", hint=HINT) from None
    return parse(content, path.stem)


def parse(content: Any, name: str) -> CustomSolver:
    """The solver that the file's content describes, checked. Raises RequestError."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _refuse(name, f'is not an object with "format": "{FORMAT}"')
    unknown = sorted(set(content) - KEYS)
    if unknown:
        _refuse(name, f"has an unknown entry {unknown[0]!r}; known: {', '.join(sorted(KEYS))}")
    quantity = content.get("quantity")
    if quantity not in QUANTITIES:
        _refuse(name, f"has quantity {quantity!r}; it is 'data' or 'noise'")
    sigmas = _numbers(name, content, "sigmas")
    rows = len(sigmas) - 1
    times, noise = content.get("timesteps"), content.get("noise")
    made = CustomSolver(
        str(content.get("name", name)),
        QUANTITIES[quantity],
        sigmas,
        None if times is None else _numbers(name, content, "timesteps", rows),
        _matrix(name, content, "x", rows),
        _matrix(name, content, "m", rows),
        np.zeros(rows) if noise is None else _numbers(name, content, "noise", rows),
    )
    _check(made)
    return made


def _check(made: CustomSolver) -> None:
    """What no solver may break: levels that are levels, and the exact line at every row."""
    if len(made.sigmas) < 2 or (made.sigmas[:-1] <= 0).any() or made.sigmas[-1] < 0:
        _refuse(
            made.name, "has sigmas that are not at least two levels above 0 (the last may be 0)"
        )
    if made.sigmas[-1] >= made.sigmas[0]:
        _refuse(made.name, f"ends at level {made.sigmas[-1]:g}, no lower than it began")
    for i in range(len(made.noise)):
        for weights, what in ((made.x, "x"), (made.m, "m")):
            if weights[i, i + 1 :].any():
                _refuse(made.name, f"reaches back before its first row: {what} of row {i}")
    _check_line(made)


def _check_line(made: CustomSolver) -> None:
    """On data that is one picture c, every z is c plus noise of its level: carried exactly.

    z is kept as its weights of [c, the first noise, draw 0, draw 1, ...].
    """
    rows = len(made.noise)
    picture, *draws = np.eye(rows + 2)
    z, answers = [picture + made.sigmas[0] * draws[0]], list[Doubles]()
    for i in range(rows):
        noise_of = (z[-1] - picture) / made.sigmas[i]
        answers.append(picture if made.quantity == "data" else noise_of)
        back = range(min(i + 1, HISTORY))
        after = made.noise[i] * draws[i + 1]
        for k in back:
            after = after + made.x[i, k] * z[i - k] + made.m[i, k] * answers[i - k]
        z.append(after)
        level = float(np.copysign(np.linalg.norm(after[1:]), after[1]))
        due = float(made.sigmas[i + 1])
        for what, found, right in (("picture", after[0], 1.0), ("noise", level, due)):
            if abs(found - right) > TOLERANCE * max(1.0, right):
                _refuse(
                    made.name,
                    f"leaves the exact line in row {i}: its {what} weighs {found:.8g},"
                    f" not {right:.8g}",
                )


def _numbers(name: str, content: Mapping[str, Any], key: str, count: int | None = None) -> Doubles:
    values = content.get(key)
    if not isinstance(values, list) or not all(map(_is_number, values)):
        _refuse(name, f"has no list of finite numbers {key!r}")
    if count is not None and len(values) != count:
        _refuse(name, f"has {len(values)} numbers in {key!r}; {count} rows are due")
    return np.array(values, np.float64)


def _matrix(name: str, content: Mapping[str, Any], key: str, rows: int) -> Doubles:
    """[rows, HISTORY], padded with zeros."""
    lists = content.get(key)
    if not isinstance(lists, list) or len(lists) != rows:
        _refuse(name, f"has no list {key!r} of {rows} rows, one for each of sigmas but the last")
    padded = np.zeros((rows, HISTORY))
    for i, row in enumerate(lists):
        if not isinstance(row, list) or len(row) > HISTORY or not all(map(_is_number, row)):
            _refuse(name, f"has row {i} of {key!r} that is not a list of up to {HISTORY} numbers")
        padded[i, : len(row)] = row
    return padded


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300  # NaN, infinity and huge whole numbers are not


def _mapping(weights: Doubles) -> Weights:
    return {k: float(weight) for k, weight in enumerate(weights) if weight != 0.0}


def _refuse(name: str, what: str) -> NoReturn:
    raise RequestError(f"solver {name!r} {what}", hint=HINT)
