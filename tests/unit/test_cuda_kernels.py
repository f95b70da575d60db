"""The kernels as they ship: PTX that every GPU from compute capability 7.5 on can be given.

nvJitLink and NVRTC are NVIDIA's own compilers; they need no GPU, and come with torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "backends" / "cuda"


def library(name: str):
    import importlib

    try:
        module = importlib.import_module(f"cuda.bindings.{name}")
        module.version() if name == "nvjitlink" else module.nvrtcVersion()
    except Exception as error:
        message = f"{name} is not here: {error}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return module


def test_the_ptx_is_that_of_the_source_in_kernels_and_rounding():
    text = (FOLDER / "row.ptx").read_text()
    named = re.findall(r"\.visible \.entry (\w+)\(", text)
    assert named == re.findall(
        r'extern "C" __global__ void (\w+)\(', (FOLDER / "row.cu").read_text()
    )
    assert ".target sm_75" in text
    assert re.search(r"^\.version 8\.0$", text, re.M), "drivers from release 525 on"
    assert "fma.rn.f32" not in text, "the host does not fuse its guidance"


@pytest.mark.export
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
def test_the_ptx_becomes_code_for_each_gpu(sm):
    link = library("nvjitlink")
    ptx = (FOLDER / "row.ptx").read_bytes()
    handle = link.create(1, [f"-arch=sm_{sm}"])
    try:
        link.add_data(handle, link.InputType.PTX, ptx, len(ptx), "row.ptx")
        link.complete(handle)
        code = bytearray(link.get_linked_cubin_size(handle))
        link.get_linked_cubin(handle, code)
    finally:
        link.destroy(handle)
    for kernel in (b"feed", b"advance", b"next_row"):
        assert b".text." + kernel in code


@pytest.mark.export
def test_the_source_compiles_to_the_same_kernels_with_a_newer_compiler():
    nvrtc = library("nvrtc")
    status, program = nvrtc.nvrtcCreateProgram(
        (FOLDER / "row.cu").read_bytes(), b"row.cu", 0, None, None
    )
    options = [b"--gpu-architecture=compute_90", b"--fmad=false"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
