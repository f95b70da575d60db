"""Compiles backends/cuda/row.cu into row.ptx, which the driver compiles for the GPU at hand.

    pip install nvidia-cuda-nvrtc-cu12==12.0.140
    python bench/make_row_ptx.py PATH/TO/libnvrtc.so.12

CUDA 12.0, so that drivers from release 525 on take it; compute capability 7.5, the oldest that
TensorRT runs on.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "backends" / "cuda"
OPTIONS = (b"--gpu-architecture=compute_75", b"--fmad=false")


def compiled(library: ctypes.CDLL, source: bytes) -> bytes:
    """The PTX. Raises SystemExit with the compiler's log."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"row.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    if library.nvrtcCompileProgram(program, len(OPTIONS), options) != 0:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise SystemExit(log.value.decode())
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, text)
    return text.value


if __name__ == "__main__":
    nvrtc = ctypes.CDLL(sys.argv[1])
    source = (FOLDER / "row.cu").read_bytes()
    (FOLDER / "row.ptx").write_bytes(compiled(nvrtc, source))
