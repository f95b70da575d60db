"""Writes a small bundle that is valid by docs/bundle-format.md: from the page, not from the code.

Its graphs are bytes that no engine reads: for tests of the reader, and, with the backend `fake` and
a vocabulary of the right length, of the command line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

F32 = "float32"


def tensor(name: str, *shape: int | str, dtype: str = F32) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    return struct.pack("<Q", len(text)) + text + data


WEIGHTS = safetensors(
    {
        "a.weight": ("F16", [2, 3], bytes(range(12))),
        "a.bias": ("F32", [2], bytes(8)),
        "scale": ("BF16", [], b"\x80\x3f"),
    }
)

KEYS = tensor("cross_keys", "B", 77, 8)
HIDDEN = tensor("encoder_hidden_states", "B", 77, 8)
SAMPLE = tensor("sample", "B", 4, "h", "w")
TIMESTEP = tensor("timestep", "B")
OUT = tensor("out_sample", "B", 4, "h", "w")
FEATURES = tensor("features0", "B", 6, "h", "w")


def component(
    name: str, inputs: list[Any], outputs: list[Any], graphs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "inputs": inputs,
        "outputs": outputs,
        "graphs": {
            graph: {"file": f"{name}/{graph}.onnx", "inputs": ins, "outputs": outs}
            for graph, (ins, outs) in graphs.items()
        },
        "weights": f"{name}/weights.safetensors",
        "config": {"channels": 4, "levels": [1, 2]},
    }


def simple(name: str, inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
    return component(name, inputs, outputs, {"full": (inputs, outputs)})


def manifest() -> dict[str, Any]:
    """All of a manifest but `files`."""
    ids = tensor("input_ids", "B", 77, dtype="int64")
    hidden = tensor("last_hidden_state", "B", 77, 8)
    image = tensor("image", "B", 3, "H", "W")
    moments, latent = tensor("moments", "B", 8, "h", "w"), tensor("latent", "B", 4, "h", "w")
    made = {
        "format": 1,
        "producer": {"sdengine": "0.1.0", "torch": "2.14.1"},
        "model": {
            "name": "tiny",
            "variant": "base",
            "prediction": "v",
            "schedule": {
                "kind": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "timesteps": 1000,
            },
            "latent": {"channels": 4, "scale": 0.18215, "factor": 8, "multiple": 8},
            "native_size": [64, 128],
            "tokenizer": {
                "file": "tokenizer/bpe_simple_vocab_16e6.txt.gz",
                "start": 49406,
                "end": 49407,
                "pad": 0,
                "length": 77,
            },
            "licence": "MIT",
            "source": {
                "file": "tiny.safetensors",
                "sha256": "ab" * 32,
                "kind": "safetensors",
                "weights": "ema",
            },
            "preview": {"matrix": [[0.1, 0.2, 0.3]] * 4, "bias": [0, 0, 0.5]},
        },
        "components": {
            "text_encoder": simple("text_encoder", [ids], [hidden]),
            "unet": component(
                "unet",
                [SAMPLE, TIMESTEP, HIDDEN],
                [OUT],
                {
                    "prologue": ([HIDDEN], [KEYS]),
                    "full": ([SAMPLE, TIMESTEP, KEYS], [OUT]),
                    "deep": ([SAMPLE, TIMESTEP, KEYS], [OUT, FEATURES]),
                    "shallow0": ([SAMPLE, TIMESTEP, FEATURES], [OUT]),
                },
            ),
            "vae_encoder": simple(
                "vae_encoder",
                [image],
                [moments],
            ),
            "vae_decoder": simple(
                "vae_decoder",
                [latent],
                [image],
            ),
        },
        "targets": {
            "openvino": {"precisions": ["bf16", "f32"], "files": ["targets/openvino/unet.xml"]}
        },
        "parity": [
            {
                "component": "unet",
                "graph": "full",
                "runtime": "onnxruntime",
                "precision": "f32",
                "case": "fox, t=981",
                "output": "out_sample",
                "max_abs": 1.5e-6,
                "psnr_db": 121.5,
                "gate": "max_abs 1e-3 of range, 80 dB",
            }
        ],
    }
    made["components"]["unet"]["graphs"]["deep"]["macs"] = 1200
    return made


def vocabulary() -> bytes:
    """As many merges as the CLIP vocabulary has; none of them merges anything."""
    merges = (f"left{i} right{i}\n" for i in range(49406 - 512))
    return gzip.compress(("version\n" + "".join(merges)).encode(), compresslevel=1)


def contents(made: dict[str, Any], merges: bytes = b"a vocabulary") -> dict[str, bytes]:
    """path -> bytes, for every file that the manifest uses."""
    graphs = [g["file"] for c in made["components"].values() for g in c["graphs"].values()]
    weights = [c["weights"] for c in made["components"].values()]
    artefacts = [f for t in made["targets"].values() for f in t["files"]]
    return {
        made["model"]["tokenizer"]["file"]: merges,
        **{name: f"graph {name}".encode() for name in graphs},
        **{name: WEIGHTS for name in weights},
        **{name: f"artefact {name}".encode() for name in artefacts},
    }


def listing(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        name: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for name, raw in files.items()
    }


def write(folder: Path, merges: bytes = b"a vocabulary") -> dict[str, Any]:
    """A whole, valid bundle at `folder`; its manifest is returned."""
    made = manifest()
    files = contents(made, merges)
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    made["files"] = listing(files)
    write_manifest(folder, made)
    return made


def write_manifest(folder: Path, made: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(made), encoding="utf-8")
