"""ONNX Runtime with a GPU that is a device of tests/fake_cuda: graphs run on the processor, on the
memory that was bound by address, when the device comes to that piece of work."""

from __future__ import annotations

from types import SimpleNamespace

import onnxruntime

from .fake_cuda import FakeDevice, view

CUDA = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def library(device: FakeDevice, available=CUDA, refuses=(), falls_back=False):
    """refuses      graphs whose capture is refused
    falls_back      sessions end on the processor, as when cuDNN is missing
    """
    made = []

    class RunOptions:
        def __init__(self):
            self.entries = {}

        def add_run_config_entry(self, name, value):
            self.entries[name] = value

    class Binding:
        def __init__(self):
            self.inputs, self.outputs = {}, {}

        def bind_input(self, name, place, index, dtype, shape, address):
            assert (place, index) == ("cuda", device.facts().index)
            self.inputs[name] = (address, tuple(shape), dtype)

        def bind_output(self, name, place, index, dtype, shape, address):
            self.outputs[name] = (address, tuple(shape), dtype)

    class InferenceSession:
        def __init__(self, path, options, providers):
            self.name = path.rsplit("/", 1)[-1]
            self.providers = dict(providers)
            chosen = next(iter(self.providers.values()))
            captured = chosen.get("enable_cuda_graph", chosen.get("trt_cuda_graph_enable"))
            if captured == "1" and self.name in refuses:
                raise RuntimeError("This session cannot use the graph capture feature\nmore")
            self.real = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            self.runs = []
            made.append(self)

        def get_inputs(self):
            return self.real.get_inputs()

        def get_outputs(self):
            return self.real.get_outputs()

        def get_providers(self):
            return ["CPUExecutionProvider"] if falls_back else [*self.providers, CUDA[-1]]

        def io_binding(self):
            return Binding()

        def run(self, names, feeds, options):
            self.runs.append(options.entries)
            return self.real.run(names, feeds)

        def run_with_iobinding(self, binding, options):
            self.runs.append(options.entries)
            inputs, outputs = dict(binding.inputs), dict(binding.outputs)

            def work():
                feeds = {n: view(a, s, t).copy() for n, (a, s, t) in inputs.items()}
                found = self.real.run(list(outputs), feeds)
                for (address, shape, dtype), value in zip(outputs.values(), found, strict=True):
                    view(address, shape, dtype)[...] = value

            device.enqueue(("engine", self.name), work)

    return SimpleNamespace(
        __version__="1.31.0",
        get_available_providers=lambda: list(available),
        SessionOptions=onnxruntime.SessionOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        RunOptions=RunOptions,
        InferenceSession=InferenceSession,
        made=made,
    )
