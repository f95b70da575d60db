"""OpenVINO's devices: which are here, what each computes in, and what each is told.

`core` is an openvino.Core, or what tests put in its place.

checked by  tests/unit/test_openvino_devices.py (made-up devices), test_backend_openvino.py (CPU)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.ports import Probe
from ..engine.spec import Precision, Profile
from . import machine
from .base import first_line

AUTO = "AUTO"
CPU = "CPU"
KINDS = (AUTO, CPU, "GPU", "NPU")
# AUTO: a graphics processor before the processor. Never the NPU: it has to be asked for.
PREFERRED = ("GPU", CPU)
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
CAPABILITIES: Mapping[str, Precision] = {"BF16": "bf16", "FP16": "f16", "FP32": "f32"}


def found(core: Any) -> list[str]:
    """`CPU`, `GPU.0`: the devices that are here, as the library names them."""
    return [str(name) for name in core.available_devices]


def resolve(core: Any, asked: str) -> str | None:
    """The device for what was asked: a kind takes the first of it. None: there is none."""
    here = found(core)
    kinds = PREFERRED if asked.upper() == AUTO else (asked.upper(),)
    for kind in kinds:
        for name in here:
            if name == kind or name.partition(".")[0] == kind:
                return name
    return None


def precisions(core: Any, device: str) -> tuple[Precision, ...]:
    """What it computes in, fastest first.

    Every kind of device runs int8 networks; it is first where instructions for it are known.
    """
    abilities = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    if device == CPU:
        floats: tuple[Precision, ...] = ("bf16", "f32") if "BF16" in abilities else ("f32",)
        fast = bool(INT8_FLAGS & set(machine.processor().split()))
    else:
        order = ("FP16", "FP32") if device.startswith("GPU") else ("FP16",)
        floats = tuple(CAPABILITIES[name] for name in order if name in abilities)
        fast = False
    return ("int8", *floats) if fast else (*floats, "int8")


def probe(core: Any, asked: str, version: str) -> Probe:
    """Whether the library can run on the device that was asked for. Never raises."""
    try:
        here = found(core)
        device = resolve(core, asked)
        if device is None:
            what = ", ".join(here) if here else "none"
            return Probe(
                False, f"OpenVINO {version} finds no {asked}; it finds {what}", _mend(asked)
            )
        able = precisions(core, device)
    except Exception as error:
        return Probe(False, f"OpenVINO cannot ask {asked}: {first_line(error)}")
    if able == ("int8",):
        return Probe(False, f"OpenVINO {version} on {device} computes in no floating point")
    threads = f", {machine.threads()} threads" if device == CPU else ""
    # What a device is made for needs no proof on the processor that exported the bundle.
    trusted: tuple[Precision, ...] = () if device == CPU else tuple(p for p in able if p == "f16")
    reason = f"OpenVINO {version} on {device}{threads}"
    return Probe(True, reason, precisions=able, speed=30, trusted=trusted)


def options(device: str, threads: int, profile: Profile) -> dict[str, Any]:
    """What a device is told of threads: the processor all, others nothing.

    Kinds of cores are named only where there are two.
    """
    if device != CPU:
        return {}
    told: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": profile.pin,
        "ENABLE_HYPER_THREADING": profile.hyper_threads,
    }
    if profile.fast_only is not None:
        told["SCHEDULING_CORE_TYPE"] = "PCORE_ONLY" if profile.fast_only else "ANY_CORE"
    return told


def maker(core: Any, device: str) -> dict[str, str]:
    """What a compiled network is bound to: the device, and its driver where it has one."""
    made = {"device": f"{device} {core.get_property(device, 'FULL_DEVICE_NAME')}"}
    if device == CPU:
        return made
    for name in ("GPU_DRIVER_VERSION", "NPU_DRIVER_VERSION", "GPU_UARCH_VERSION"):
        try:
            made[name] = str(core.get_property(device, name))
        except Exception:
            continue  # of another kind of device, or of another version of the library
    return made


def keeps(core: Any, device: str) -> bool:
    """Whether what the device compiles can be written to a file and read back."""
    return "EXPORT_IMPORT" in core.get_property(device, "OPTIMIZATION_CAPABILITIES")


def _mend(asked: str) -> str:
    drivers = {
        "GPU": "apt install intel-opencl-icd",
        "NPU": "install the driver from github.com/intel/linux-npu-driver",
    }
    return drivers.get(asked.upper().partition(".")[0], "")
