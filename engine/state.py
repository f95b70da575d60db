"""A stopped run in a file, from which it goes on exactly.

A safetensors file: tensor `x` is the latent, `history` what the solver reaches back to, and
`feature.NAME` the network's cached features; all the rest is JSON in the header's metadata, with a
hash over everything.

checked by  tests/unit/test_state.py (a resumed run is the whole run bit for bit)
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from . import fields, images
from .errors import BadManifest, CorruptPart, RequestError, StorageError
from .ports import Array, State
from .table import Table
from .weights import read_header

FORMAT = 1
KEY = "sdengine.state"  # of the metadata's one entry
FEATURE = "feature."
SHALLOW = "shallow"  # a graph of this name, with or without @precision, takes cached features

_DAMAGED = "save the latents again, or run from the start"


@dataclass(frozen=True)
class Saved:
    """What a file holds: one batch of a run, between two rows.

    bundle      id of the bundle
    request     the batch's own request, nothing left open, as Request.to_dict gives it
    state       of the loop; x and history float32
    noise       a snapshot for each picture's stream
    conditions  name -> digest, of each thing beside the request that the pictures depend on
    features    the network's cached deep features; empty where the next row needs none
    """

    bundle: str
    request: Mapping[str, Any]
    state: State
    noise: Sequence[Mapping[str, Any]]
    conditions: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, Array] = field(default_factory=dict)

    def check(
        self,
        *,
        bundle: str,
        request: Mapping[str, Any],
        table: Table,
        shape: tuple[int, ...],
        conditions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Whether this run can go on from here; the streams check their own snapshots.

        shape       of x: [B, C, h, w]
        raises      RequestError that names what differs
        """
        if bundle != self.bundle:
            raise RequestError(
                f"these latents were saved by a run of bundle {self.bundle}; this is {bundle}",
                hint="give --model the bundle that they were saved with",
            )
        asked = json.loads(json.dumps(dict(request)))
        if odd := _differing(asked, self.request):
            raise RequestError(
                f"these latents belong to another request: {'; '.join(odd)}",
                hint="leave these options out (--from-latents brings its own), or start anew",
            )
        if odd := _differing(dict(conditions), self.conditions):
            names = sorted(line.split()[0] for line in odd)
            raise RequestError(
                f"these latents were made with another {', '.join(names)}",
                hint="give the same files as before, or start anew",
            )
        found = (self.state.x.shape, self.state.history.shape, len(self.noise))
        expected = (shape, (2 * table.depth, int(np.prod(shape))), shape[0])
        if found != expected or not 0 < self.state.rows <= len(table):
            raise RequestError(
                f"these latents do not fit the run: found x {found[0]}, history {found[1]},"
                f" {found[2]} noise streams, {self.state.rows} rows done; expected x"
                f" {expected[0]}, history {expected[1]}, {expected[2]} streams, 1 to {len(table)}",
                hint="resume with the version of sdengine that saved them, or start anew",
            )
        if needs_features(table, self.state.rows) and not self.features:
            raise RequestError(
                f"row {self.state.rows} reuses the network's features, and the file has none",
                hint="save after another row, one before a full network call",
            )


def needs_features(table: Table, rows: int) -> bool:
    """Whether the row after `rows` rows takes features that an earlier row left."""
    return rows < len(table) and table.graphs[rows].split("@")[0] == SHALLOW


def digest(value: Array | str | bytes) -> str:
    """SHA-256 of a condition: of an array with its dtype and shape, of text as UTF-8."""
    if isinstance(value, np.ndarray):
        head = f"{value.dtype.str} {value.shape}\n".encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()


def save(saved: Saved, path: Path) -> Path:
    """All or nothing; a file of that name is replaced. Raises StorageError."""
    tensors = {"x": saved.state.x, "history": saved.state.history}
    tensors |= {FEATURE + name: value for name, value in saved.features.items()}
    header: dict[str, Any] = {}
    data = b""
    for name, value in tensors.items():
        assert value.dtype == np.float32, f"{name} is {value.dtype}"
        raw = value.astype("<f4").tobytes()
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": span}
        data += raw
    facts = {
        "format": FORMAT,
        "bundle": saved.bundle,
        "request": dict(saved.request),
        "rows": saved.state.rows,
        "noise": [dict(snapshot) for snapshot in saved.noise],
        "conditions": dict(saved.conditions),
    }
    facts["sha256"] = _sealed(facts, header, data)
    text = json.dumps({"__metadata__": {KEY: json.dumps(facts)}, **header}).encode("ascii")
    text += b" " * (-len(text) % 8)
    return images.write_file(struct.pack("<Q", len(text)) + text + data, path)


def load(path: Path) -> Saved:
    """Read it back. Raises StorageError for a file that is not whole, or none of these."""
    try:
        places = read_header(path)
        with open(path, "rb") as file:
            header = fields.parse(file.read(int.from_bytes(file.read(8), "little")))
            facts = _facts(path, header.pop("__metadata__", None))  # before a large foreign file
            data = file.read()
    except CorruptPart as error:
        raise StorageError(error.message, hint=_DAMAGED) from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}", hint="check the file and its permissions"
        ) from error
    if facts.pop("sha256") != _sealed(facts, header, data):
        raise StorageError(f"{path} is damaged: its hash is not the stored one", hint=_DAMAGED)
    tensors = {}
    for name, place in places.items():
        begin, _ = header[name]["data_offsets"]
        flat = np.frombuffer(data, "<f4", place.nbytes // 4, begin)
        tensors[name] = flat.reshape(place.shape).astype(np.float32)
    state = State(facts["rows"], tensors.pop("x"), tensors.pop("history"))
    features = {name.removeprefix(FEATURE): value for name, value in tensors.items()}
    return Saved(
        facts["bundle"], facts["request"], state, facts["noise"], facts["conditions"], features
    )


def _facts(path: Path, metadata: Any) -> dict[str, Any]:
    """The metadata's JSON, checked field by field."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise StorageError(
            f"{path} holds no saved run: its metadata has no {KEY!r}",
            hint="give --from-latents a file that --save-latents wrote",
        )
    try:
        facts = fields.parse(metadata[KEY].encode())
        if isinstance(facts, dict) and facts.get("format") != FORMAT:
            raise StorageError(
                f"{path} has format {facts.get('format')!r}; this version reads {FORMAT}",
                hint="resume with the version of sdengine that saved it, or run from the start",
            )
        return _FACTS(facts, "state")
    except BadManifest as error:
        raise StorageError(f"{path} is damaged: {error.message}", hint=_DAMAGED) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        fields.refuse(where, "an object", value)
    return value


_FACTS: fields.Kind[dict[str, Any]] = fields.record(
    dict,
    {
        "format": fields.integer(FORMAT, FORMAT),
        "bundle": fields.text,
        "request": _object,
        "rows": fields.integer(1),
        "noise": fields.sequence(_object, low=1),
        "conditions": fields.mapping(fields.text, fields.text),
        "sha256": fields.text,
    },
)


def _sealed(facts: Mapping[str, Any], header: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 over all of a file but the hash itself."""
    parts = {k: _plain(v) for k, v in facts.items()}
    text = json.dumps([parts, header], sort_keys=True).encode()
    return hashlib.sha256(text + data).hexdigest()


def _plain(value: Any) -> Any:
    """What the checks made read-only, as JSON has it."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _differing(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {saved.get(name)!r} there, {asked.get(name)!r} here"
        for name in sorted({*asked, *saved})
        if asked.get(name) != saved.get(name) or (name in asked) != (name in saved)
    ]
