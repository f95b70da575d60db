"""torch's backend for GPUs, with the processor in the GPU's place: all but the capture itself.

What the capture would break is played: `Captured` answers in the same tensors each time.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdengine import api, backends
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendUnavailable
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.spec import Profile

pytestmark = pytest.mark.export

UNET = {"B": 2, "T": 77, "h": 16, "w": 16}


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture(scope="module")
def backend():
    from sdengine.backends.torch_cuda import TorchCuda

    return TorchCuda("cpu")


@pytest.fixture
def captured(monkeypatch):
    """Calls write their results into one set of tensors, as a replayed graph does."""
    from sdengine.backends import torch_cuda

    once, kept = torch_cuda.Call._once, {}

    def replayed(self):
        found = once(self)
        own = kept.setdefault(id(self), {n: v.clone() for n, v in found.items()})
        for name, value in found.items():
            own[name].copy_(value)
        return own

    monkeypatch.setattr(torch_cuda.Call, "_once", replayed)


def picture(bundle, backend, precision="f32", **request):
    with Pipeline(bundle, api.EngineSessions(bundle, backend, precision, 1), {}) as pipe:
        result = pipe(prompt="a red fox", seed=3, **request)
        return np.asarray(result.image, float), result, pipe


OPTIONS = [
    {"steps": 3},
    {"steps": 4, "cache": 2, "sampler": "euler_a"},
    {"steps": 3, "halves": "apart", "sampler": "unipc_2"},
]


@pytest.mark.parametrize("request_", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_picture_is_that_of_the_loop(request_, bundle, backend, captured, monkeypatch):
    from sdengine.backends import torch_cuda

    rows = []
    row = torch_cuda.TorchBoard.row
    monkeypatch.setattr(torch_cuda.TorchBoard, "row", lambda s, r: (rows.append(r), row(s, r)))
    found, result, _ = picture(bundle, backend, **request_)
    assert [r.index for r in rows] == list(range(len(result.timings.rows)))
    wanted, _, _ = picture(bundle, backends.get("torch"), **request_)
    assert np.abs(found - wanted).max() <= 2


def test_a_run_that_is_saved_goes_through_the_loop(bundle, backend):
    request = {"steps": 4, "cache": 2, "prompt": "a red fox", "seed": 3}
    whole, _, _ = picture(bundle, backend, steps=4, cache=2)
    saved = []
    with Pipeline(bundle, api.EngineSessions(bundle, backend, "f32", 1), {}) as pipe:
        (*_, result) = pipe.stream(on_state=saved.append, **request)
    assert np.abs(np.asarray(result.image, float) - whole).max() <= 2
    assert type(saved[0].features["both.0,0.features0"]) is np.ndarray


def test_bound_sessions_share_a_call_and_never_see_each_other(bundle, backend):
    random = np.random.default_rng(0)

    def feeds():
        return {
            "sample": random.standard_normal((2, 4, 16, 16)).astype(np.float32),
            "timestep": np.full(2, 300.0, np.float32),
            "encoder_hidden_states": random.standard_normal((2, 77, 96)).astype(np.float32),
        }

    component = bundle.components["unet"]
    session = backend.load(component, Profile(UNET))
    other = backends.get("torch").load(component, Profile(UNET))
    one, two = feeds(), feeds()
    text = "encoder_hidden_states"
    bound = [session.bind({text: v[text]}) for v in (one, two)]
    for k, own in ((0, one), (1, two), (0, two), (1, one)):
        rest = {"sample": own["sample"], "timestep": own["timestep"]}
        held = (one, two)[k][text]
        wanted = other({**rest, text: held})["out_sample"]
        np.testing.assert_allclose(bound[k](rest)["out_sample"], wanted, rtol=0, atol=2e-5)
    session.close()
    other.close()


def test_float16_is_what_runs(bundle, backend):
    session = backend.load(bundle.components["text_encoder"], Profile({"B": 1}, "f16"))
    ids = np.arange(77, dtype=np.int64)[None]
    found = session({"input_ids": ids})["last_hidden_state"]
    session.close()
    plain = backends.get("torch").load(bundle.components["text_encoder"], Profile({"B": 1}))
    wanted = plain({"input_ids": ids})["last_hidden_state"]
    plain.close()
    error = np.sqrt(np.mean((found - wanted) ** 2)) / np.ptp(wanted)
    assert 1e-6 < error < 1e-2, "half precision, and no less"


def test_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    probe = backends.get("torch-cuda").probe()
    assert not probe.ok
    assert "finds no GPU" in probe.reason
    assert "CUDA" in probe.mend
    with pytest.raises(BackendUnavailable, match="finds no GPU"):
        backends.choose("torch-cuda")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:9", "there is no cuda:9: torch sees"),
        ("tpu", "no GPU that"),
        ("cuda:x", "no GPU that"),
    ],
)
def test_a_device_that_is_not_there(device, said):
    from sdengine.backends.torch_cuda import TorchCuda

    with pytest.raises(BackendUnavailable, match=said) as caught:
        TorchCuda()._chosen(Profile(device=device))
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint
    probe = TorchCuda().probe_on(device)
    assert (probe.ok, said in probe.reason) == (False, True)


def test_how_networks_run_is_an_option(monkeypatch):
    from sdengine.backends.torch_cuda import _mode

    for asked, mode in (("compile", "compile"), ("eager", "eager"), ("", "graphs")):
        monkeypatch.setenv("SDENGINE_TORCH", asked)
        assert _mode() == mode


def test_a_capture_comes_after_the_warm_calls_and_may_fail(monkeypatch, caplog):
    import torch

    from sdengine.backends import torch_cuda

    calls = []

    def answer(x):
        calls.append(None)
        return {"y": x + 1}

    call = torch_cuda.Call(answer, {"x": (2,)}, {"x": "float32"}, torch.device("cpu"), True)

    class Graph:
        def replay(self):
            with torch.inference_mode():
                call._outputs["y"].copy_(call.inputs["x"] + 1)

    class Capturing:
        def __init__(self, graph):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    for index in range(6):
        call.inputs["x"].fill_(index)
        assert call.run()["y"].tolist() == [index + 1] * 2
    assert len(calls) == torch_cuda.WARM + 1, "warm calls, and the one that was captured"

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    other = torch_cuda.Call(answer, {"x": (2,)}, {"x": "float32"}, torch.device("cpu"), True)
    for _ in range(6):
        assert other.run()["y"].tolist() == [1.0, 1.0]
    assert [m for m in caplog.messages if "cannot be captured" in m] == [
        "a network cannot be captured, and runs as it is: operation not permitted when stream is"
        " capturing"
    ]
