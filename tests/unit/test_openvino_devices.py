"""OpenVINO's devices on made-up machines: what is chosen, told, kept and refused."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.backends import devices, machine
from sdengine.backends import openvino as module
from sdengine.backends.cache import Store
from sdengine.backends.openvino import OpenVINO
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendUnavailable, UnknownName
from sdengine.engine.spec import Profile

ABILITIES = {
    "CPU": ["FP32", "BF16", "INT8", "EXPORT_IMPORT"],
    "GPU.0": ["FP32", "FP16", "INT8", "EXPORT_IMPORT"],
    "GPU.1": ["FP32", "FP16", "INT8", "GPU_HW_MATMUL", "EXPORT_IMPORT"],
    "NPU": ["FP16", "INT8"],
}


class Core:
    """Answers as the library does, for the devices that it is given."""

    def __init__(self, *names: str) -> None:
        self.available_devices = names
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    def get_property(self, device: str, name: str) -> Any:
        known = {
            "OPTIMIZATION_CAPABILITIES": ABILITIES.get(device),
            "FULL_DEVICE_NAME": f"Some {device}",
        }
        if device.startswith("GPU"):
            known["GPU_DRIVER_VERSION"] = "31.4"
        if known.get(name) is None:
            raise RuntimeError(f"{device} has no {name}\nat some line of C++")
        return known[name]

    def read_model(self, path: Any) -> Any:
        return types.SimpleNamespace(
            inputs=self.ports("sample", "timestep", "keys", "values"),
            outputs=self.ports("out_sample"),
            reshape=lambda shapes: None,
            get_ordered_ops=list,
        )

    def ports(self, *names: str) -> list[Any]:
        return [types.SimpleNamespace(names={n}) for n in names]

    def compile_model(self, model: Any, device: str, config: dict[str, Any]) -> Any:
        self.compiled.append((device, config))
        return types.SimpleNamespace(export_model=lambda file: file.write(b"compiled"))


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """One whose machine has the devices that the test names."""
    monkeypatch.setattr(machine, "processor", lambda: "some processor")
    library = types.SimpleNamespace(get_version=lambda: "2026.4.1-x", PartialShape=list)
    monkeypatch.setattr(module, "library", lambda: library)

    def make(*names: str) -> OpenVINO:
        made = OpenVINO(Store(tmp_path / "cache"))
        made.__dict__["_core"] = Core(*names)
        return made

    return make


@pytest.mark.parametrize(
    ("here", "asked", "found"),
    [
        (("CPU",), "AUTO", "CPU"),
        (("CPU", "NPU"), "auto", "CPU"),
        (("CPU", "GPU.0", "GPU.1", "NPU"), "AUTO", "GPU.0"),
        (("CPU", "GPU.0", "GPU.1"), "GPU", "GPU.0"),
        (("CPU", "GPU.0", "GPU.1"), "gpu.1", "GPU.1"),
        (("CPU", "NPU"), "NPU", "NPU"),
        (("CPU",), "GPU", None),
        (("CPU", "GPU.0"), "GPU.1", None),
    ],
)
def test_the_device_for_what_was_asked(here, asked, found):
    assert devices.resolve(Core(*here), asked) == found


@pytest.mark.parametrize(
    ("asked", "precisions", "trusted", "reason"),
    [
        ("CPU", ("bf16", "f32", "int8"), (), "OpenVINO 2026.4.1 on CPU, "),
        ("GPU.1", ("f16", "f32", "int8"), ("f16",), "OpenVINO 2026.4.1 on GPU.1"),
        ("NPU", ("f16", "int8"), ("f16",), "OpenVINO 2026.4.1 on NPU"),
    ],
)
def test_each_device_has_its_own_precisions(backend, asked, precisions, trusted, reason):
    probe = backend("CPU", "GPU.0", "GPU.1", "NPU").probe_on(asked)
    assert probe.ok
    assert (probe.precisions, probe.trusted) == (precisions, trusted)
    assert probe.reason.startswith(reason)


@pytest.mark.parametrize(
    ("asked", "mend"),
    [("GPU", "intel-opencl-icd"), ("NPU", "linux-npu-driver"), ("GPU.3", "intel-opencl-icd")],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(backend, asked, mend, handmade,
                                                                  tmp_path):  # fmt: skip
    made = backend("CPU", "GPU.1") if asked == "GPU.3" else backend("CPU")
    probe = made.probe_on(asked)
    assert not probe.ok
    assert probe.reason.endswith(
        f"finds no {asked}; it finds {', '.join(made._core.available_devices)}"
    )
    assert mend in probe.mend
    with pytest.raises(BackendUnavailable, match=f"finds no {asked}") as caught:
        made.load(handmade.component(tmp_path), Profile(device=asked))
    assert mend in caught.value.hint


def test_a_name_that_is_no_device(backend):
    with pytest.raises(UnknownName, match="unknown device 'TPU'") as caught:
        backend("CPU").probe_on("TPU")
    assert "known: AUTO, CPU, GPU, NPU" in caught.value.hint


def test_a_library_that_cannot_say(backend):
    made = backend("CPU", "GPU.7")
    assert made.probe_on("GPU.7").reason == (
        "OpenVINO cannot ask GPU.7: GPU.7 has no OPTIMIZATION_CAPABILITIES"
    )


DIMS = {"B": 2, "h": 8, "w": 16}


@pytest.mark.parametrize(
    ("asked", "precision", "hint", "told"),
    [
        ("CPU", "f32", "f32", {"INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING"}),
        ("GPU", "f16", "f16", set()),
        ("GPU", "int8", "f16", set()),
        ("GPU", "f32", "f32", set()),
        ("AUTO", "f16", "f16", set()),
        ("NPU", "f16", "f16", set()),
    ],
)
def test_what_a_device_is_told(backend, handmade, tmp_path, asked, precision, hint, told):
    """Threads are the processor's; other layers of an int8 network run in the fastest float."""
    made = backend("CPU", "GPU.0", "NPU")
    component = handmade.component(tmp_path / "unet")
    made.compile(component, component.graphs["full"], Profile(DIMS, precision, device=asked))
    ((device, config),) = made._core.compiled
    assert device == {"AUTO": "GPU.0", "GPU": "GPU.0"}.get(asked, asked)
    assert config["INFERENCE_PRECISION_HINT"] == hint
    names = {"INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING"}
    assert told <= config.keys()
    assert (not told) == config.keys().isdisjoint(names)


def test_each_device_has_its_own_entry_in_the_cache(backend, handmade, tmp_path):
    """With its driver; what cannot be written to a file is not."""
    made = backend("CPU", "GPU.0", "NPU")
    component = handmade.component(tmp_path / "unet")
    for asked in ("CPU", "GPU", "NPU"):
        precision = "f32" if asked == "CPU" else "f16"
        made.compile(component, component.graphs["full"], Profile(DIMS, precision, device=asked))
    entries = {e.made["device"]: e.made for e in made._store.entries()}
    assert entries.keys() == {"CPU Some CPU", "GPU.0 Some GPU.0"}
    assert entries["GPU.0 Some GPU.0"]["GPU_DRIVER_VERSION"] == "31.4"


def test_a_graphics_processor_takes_half_precision_by_itself(backend):
    bundle = open_bundle(api.EMBEDDED["emoji"])
    made = backend("CPU", "GPU.0", "NPU")
    assert api.choose_precision(bundle, "openvino", made.probe_on("GPU"), None) == "f16"
    assert api.choose_precision(bundle, "openvino", made.probe_on("GPU"), "f32") == "f32"
    assert api.choose_precision(bundle, "openvino", made.probe_on("NPU"), None) == "f16"
    assert api.choose_precision(bundle, "openvino", made.probe_on("CPU"), None) != "f16"


def test_backends_without_devices_refuse_one():
    with pytest.raises(BackendUnavailable, match="onnxruntime takes no device") as caught:
        backends.choose("onnxruntime", "GPU")
    assert caught.value.hint == "sdengine run --device GPU --backend openvino"
    with pytest.raises(BackendUnavailable, match=r"the NVIDIA backends \(cuda:1\) do") as caught:
        backends.choose("onnxruntime", "cuda:1")
    assert caught.value.hint == "sdengine run --device cuda:1 --backend torch-cuda"


@pytest.mark.ov
def test_the_processor_by_name_makes_the_same_picture():
    """Here, on the real library: AUTO and CPU are what runs without a word."""
    pytest.importorskip("openvino")
    made = []
    for device in (None, "CPU", "AUTO"):
        with api.load(backend="openvino", precision="f32", threads=1, device=device) as pipe:
            result = pipe(prompt="a fox", steps=1, seed=3, width=64, height=64)
            made.append(np.asarray(result.image))
    assert all((image == made[0]).all() for image in made[1:])
