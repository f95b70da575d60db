"""What every backend keeps, on the components of a real (tiny, random) bundle.

The yardstick is torch in float32, called here directly on export's modules, not through a backend.
Where the environment says CI=true, a backend that cannot run is a failure; elsewhere it is skipped.
A backend that needs an environment of its own is tested there: SDENGINE_CONTRACT=ipex.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from sdengine import backends
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import FeedMismatch, MissingPart, SessionClosed
from sdengine.engine.spec import Profile

COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
TEXT = "encoder_hidden_states"
# Largest difference from torch float32, in deviations of the reference: rounding of float32 in
# another order of summation. bfloat16 keeps 8 bits of the mantissa: 40 dB is the project's gate.
# A trained network makes more of rounding where it is shown noise: the embedded decoder 1.1e-3 on
# torch itself, with channels last and another attention kernel. bench/gpu_visit.py sets its own.
MAX_ABS_F32 = float(os.environ.get("SDENGINE_CONTRACT_MAX_ABS", "1e-4"))
MIN_PSNR_DB_BF16 = 40.0
MARKS = {
    "openvino": pytest.mark.ov,
    "onnxruntime": pytest.mark.ort,
    "torch": pytest.mark.export,
}
APART = ("ipex",)  # fits one old torch alone
CHOSEN = os.environ.get("SDENGINE_CONTRACT", ",".join(MARKS)).split(",")

pytestmark = pytest.mark.export


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=MARKS.get(n, ()), id=n) for n in CHOSEN]
)
def backend(request):
    found = backends.get(request.param)
    probe = found.probe()
    if not probe.ok:
        message = f"{request.param}: {probe.reason}; mend: {probe.mend}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def components(tiny_bundle):
    return open_bundle(tiny_bundle).components


@pytest.fixture(scope="module")
def sessions(backend, components):
    """Sessions by component, dimensions and precision; loaded once for all tests here."""
    made = {}

    def get(name, dims=None, precision="f32"):
        profile = Profile({} if dims is None else dims, precision)
        if (name, profile) not in made:
            made[name, profile] = backend.load(components[name], profile)
        return made[name, profile]

    yield get
    for session in made.values():
        session.close()


def sizes(name: str, batch: int = 2, h: int = 8, w: int = 16) -> dict[str, int]:
    """Not square, so that swapped axes show."""
    return {
        "text_encoder": {"B": batch},
        "unet": {"B": batch, "T": 77, "h": h, "w": w},
        "vae_encoder": {"B": batch, "H": 8 * h, "W": 8 * w},
        "vae_decoder": {"B": batch, "h": h, "w": w},
    }[name]


def inputs(component, dims, seed: int = 0) -> dict[str, np.ndarray]:
    """Values as they occur: token ids, times, normal latents, pictures in -1..1."""
    random = np.random.default_rng(seed)
    values = {}
    for tensor in component.spec.inputs:
        shape = tensor.resolve(dims)
        if tensor.dtype == "int64":
            values[tensor.name] = random.integers(0, 49408, shape)
        elif tensor.name == "timestep":
            values[tensor.name] = random.uniform(0, 999, shape).astype(np.float32)
        elif tensor.name == "image":
            values[tensor.name] = random.uniform(-1, 1, shape).astype(np.float32)
        else:
            values[tensor.name] = random.standard_normal(shape).astype(np.float32)
    return values


@pytest.fixture(scope="module")
def reference(components):
    """name, feeds -> the output of torch float32."""
    import torch
    from safetensors.torch import load_file

    from sdengine.export.modules import text, unet, vae

    made = {
        "text_encoder": (text.PREFIX, text.TextConfig, text.TextEncoder),
        "unet": (unet.PREFIX, unet.UNetConfig, unet.UNet),
        "vae_encoder": (vae.PREFIX, vae.VAEConfig, vae.VAEEncoder),
        "vae_decoder": (vae.PREFIX, vae.VAEConfig, vae.VAEDecoder),
    }
    modules = {}

    def run(name, feeds):
        if name not in modules:
            prefix, config, module = made[name]
            modules[name] = module(config.from_dict(dict(components[name].config))).eval()
            stored = load_file(components[name].weights)
            state = {k.removeprefix(prefix): v.float() for k, v in stored.items()}
            modules[name].load_state_dict(state)
        with torch.inference_mode():
            return modules[name](**{k: torch.from_numpy(v) for k, v in feeds.items()}).numpy()

    return run


def deviations(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak: the range of the reference."""
    return float(20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((found - wanted) ** 2))))


def test_every_backend_is_tested_somewhere():
    assert {*MARKS, *APART} == set(backends.NAMES)


@pytest.mark.parametrize("name", COMPONENTS)
def test_float32_agrees_with_torch(name, sessions, components, reference):
    component, dims = components[name], sizes(name)
    feeds = inputs(component, dims)
    result = sessions(name, dims)(feeds)
    (output,) = component.spec.outputs
    assert list(result) == [output.name]
    wanted = reference(name, feeds)
    assert result[output.name].dtype == output.dtype
    assert result[output.name].shape == wanted.shape
    assert deviations(result[output.name], wanted) <= MAX_ABS_F32


@pytest.mark.parametrize("name", COMPONENTS)
def test_bfloat16_agrees_with_torch_float32(name, backend, sessions, components, reference):
    if "bf16" not in backend.probe().precisions:
        pytest.skip(f"{backend.name} computes in {', '.join(backend.probe().precisions)} here")
    component, dims = components[name], sizes(name)
    feeds = inputs(component, dims)
    (result,) = sessions(name, dims, "bf16")(feeds).values()
    assert result.dtype == np.float32
    assert psnr_db(result, reference(name, feeds)) >= MIN_PSNR_DB_BF16


@pytest.mark.parametrize("name", COMPONENTS)
def test_free_dimensions_take_any_size(name, sessions, components, reference):
    component, session = components[name], sessions(name)
    for batch, h, w in ((1, 8, 8), (3, 8, 16), (1, 16, 8)):
        feeds = inputs(component, sizes(name, batch, h, w))
        (result,) = session(feeds).values()
        assert deviations(result, reference(name, feeds)) <= MAX_ABS_F32


def test_another_batch_is_another_profile(sessions, components, reference):
    for batch in (1, 2):
        dims = sizes("unet", batch)
        feeds = inputs(components["unet"], dims)
        (result,) = sessions("unet", dims)(feeds).values()
        assert deviations(result, reference("unet", feeds)) <= MAX_ABS_F32


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_same_feeds_same_numbers(precision, backend, sessions, components):
    if precision not in backend.probe().precisions:
        pytest.skip(f"{backend.name} does not compute in {precision} here")
    dims = sizes("unet")
    session, feeds = sessions("unet", dims, precision), inputs(components["unet"], dims)
    first = session(feeds)["out_sample"]
    session(inputs(components["unet"], dims, seed=1))
    np.testing.assert_array_equal(session(feeds)["out_sample"], first)


@pytest.mark.parametrize("name", COMPONENTS)
def test_results_belong_to_the_caller(name, sessions, components):
    """The next call must not write into an earlier result, nor see what the caller did to it."""
    component, dims = components[name], sizes(name)
    session = sessions(name, dims)
    feeds = inputs(component, dims)
    (first,) = session(feeds).values()
    kept = first.copy()
    session(inputs(component, dims, seed=1))
    np.testing.assert_array_equal(first, kept)
    first[:] = np.nan
    (again,) = session(feeds).values()
    np.testing.assert_array_equal(again, kept)


def test_feeds_stay_as_they_are(sessions, components):
    dims = sizes("unet")
    feeds = inputs(components["unet"], dims)
    before = {k: v.copy() for k, v in feeds.items()}
    sessions("unet", dims)(feeds)
    for name, value in feeds.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("dims", [{}, sizes("unet")], ids=["free", "static"])
def test_memory_layout_does_not_matter(dims, sessions, components):
    """Views in Fortran order, with strides, or read-only hold the same numbers."""
    session = sessions("unet", dims)
    feeds = inputs(components["unet"], sizes("unet"))
    wanted = session(feeds)["out_sample"]
    strided = np.repeat(feeds["sample"], 2, axis=3)[..., ::2]
    locked = {k: v.copy() for k, v in feeds.items()}
    for value in locked.values():
        value.flags.writeable = False
    for other in (
        {**feeds, "sample": np.asfortranarray(feeds["sample"])},
        {**feeds, "sample": strided},
        locked,
    ):
        np.testing.assert_array_equal(session(other)["out_sample"], wanted)
    text, rest = {TEXT: locked[TEXT]}, {k: v for k, v in locked.items() if k != TEXT}
    np.testing.assert_array_equal(session.bind(text)(rest)["out_sample"], wanted)


@pytest.mark.parametrize("dims", [{}, sizes("unet")], ids=["free", "static"])
def test_bound_equals_unbound(dims, sessions, components):
    session, feeds = sessions("unet", dims), inputs(components["unet"], sizes("unet"))
    wanted = session(feeds)["out_sample"]
    for held in ([TEXT], ["timestep"], [TEXT, "timestep"], ["sample", "timestep", TEXT], []):
        view = session.bind({k: feeds[k] for k in held})
        rest = {k: v for k, v in feeds.items() if k not in held}
        np.testing.assert_array_equal(view(rest)["out_sample"], wanted, err_msg=str(held))
    twice = session.bind({"timestep": feeds["timestep"]}).bind({TEXT: feeds[TEXT]})
    np.testing.assert_array_equal(twice({"sample": feeds["sample"]})["out_sample"], wanted)


def test_bound_sessions_never_see_each_others_text(sessions, components):
    session, dims = sessions("unet", sizes("unet")), sizes("unet")
    one, two = (inputs(components["unet"], dims, seed) for seed in (1, 2))
    rest = {k: v for k, v in one.items() if k != TEXT}
    wanted = [session({**rest, TEXT: f[TEXT]})["out_sample"] for f in (one, two)]
    assert deviations(wanted[0], wanted[1]) > 1e-3, "the text must make a difference here"
    views = [session.bind({TEXT: f[TEXT]}) for f in (one, two)]
    for _ in range(3):
        for view, want in zip(views, wanted, strict=True):
            np.testing.assert_array_equal(view(rest)["out_sample"], want)
        np.testing.assert_array_equal(session({**rest, TEXT: two[TEXT]})["out_sample"], wanted[1])


def test_bound_sessions_in_two_threads(sessions, components):
    session, dims = sessions("unet", sizes("unet")), sizes("unet")
    feeds = [inputs(components["unet"], dims, seed) for seed in (1, 2)]
    wanted = [session(f)["out_sample"] for f in feeds]
    views = [session.bind({TEXT: f[TEXT]}) for f in feeds]
    wrong: list[int] = []

    def work(i: int) -> None:
        rest = {k: v for k, v in feeds[i].items() if k != TEXT}
        for _ in range(5):
            if not np.array_equal(views[i](rest)["out_sample"], wanted[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_bound_values_are_the_callers_no_more(sessions, components):
    session, feeds = sessions("unet", sizes("unet")), inputs(components["unet"], sizes("unet"))
    wanted = session(feeds)["out_sample"]
    held = {k: feeds[k].copy() for k in (TEXT, "timestep")}
    view = session.bind(held)
    for value in held.values():
        value[:] = 0
    np.testing.assert_array_equal(view({"sample": feeds["sample"]})["out_sample"], wanted)


CUTS = (0, 1, 2)


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("dims", [{}, sizes("unet")], ids=["free", "static"])
def test_shallow_with_the_features_of_the_same_step_is_full(dims, bound, sessions, components):
    """The law of the feature cache: no number is lost at the cut, whichever graph runs."""
    session, feeds = sessions("unet", dims), inputs(components["unet"], sizes("unet"))
    wanted = session(feeds)["out_sample"]
    if bound:
        session = session.bind({TEXT: feeds.pop(TEXT)})
    deep = session.graph("deep")(feeds)
    assert list(deep) == ["out_sample", *(f"features{k}" for k in CUTS)]
    assert deviations(deep["out_sample"], wanted) <= MAX_ABS_F32
    for k in CUTS:
        given = {**feeds, f"features{k}": deep[f"features{k}"]}
        found = session.graph(f"shallow{k}")(given)
        assert list(found) == ["out_sample"]
        assert deviations(found["out_sample"], wanted) <= MAX_ABS_F32
        given[f"features{k}"] = -given[f"features{k}"]
        other = session.graph(f"shallow{k}")(given)["out_sample"]
        assert deviations(other, wanted) > 0.1, "the features decide"


def test_shallow_in_bfloat16(backend, sessions, components, reference):
    if "bf16" not in backend.probe().precisions:
        pytest.skip(f"{backend.name} computes in {', '.join(backend.probe().precisions)} here")
    session, feeds = (
        sessions("unet", sizes("unet"), "bf16"),
        inputs(components["unet"], sizes("unet")),
    )
    deep = session.graph("deep")(feeds)
    for k in CUTS:
        given = {**feeds, f"features{k}": deep[f"features{k}"]}
        found = session.graph(f"shallow{k}")(given)["out_sample"]
        assert psnr_db(found, reference("unet", feeds)) >= MIN_PSNR_DB_BF16


def test_features_are_those_of_torch(sessions, components):
    """Reference: the activations of torch's own module, caught by a hook where skip k joins."""
    import torch
    from safetensors.torch import load_file

    from sdengine.export.modules import unet

    component, feeds = components["unet"], inputs(components["unet"], sizes("unet"))
    module = unet.UNet(unet.UNetConfig.from_dict(dict(component.config))).eval()
    stored = load_file(component.weights)
    module.load_state_dict({k.removeprefix(unet.PREFIX): v.float() for k, v in stored.items()})
    caught = {}
    blocks = list(module.output_blocks)
    for k in CUTS:
        # What enters the block that takes skip k is what the block before it has given.
        blocks[-2 - k].register_forward_hook(lambda *args, k=k: caught.update({k: args[-1]}))
    with torch.inference_mode():
        module(**{n: torch.from_numpy(v) for n, v in feeds.items()})
    deep = sessions("unet", sizes("unet")).graph("deep")(feeds)
    for k in CUTS:
        assert deviations(deep[f"features{k}"], caught[k].numpy()) <= MAX_ABS_F32


def test_views_of_graphs_share_what_is_bound_and_nothing_else(sessions, components):
    """Deep and shallow of two texts, run in turn: none sees the other's text or features."""
    session, dims = sessions("unet", sizes("unet")), sizes("unet")
    feeds = [inputs(components["unet"], dims, seed) for seed in (1, 2)]
    wanted = [session(f)["out_sample"] for f in feeds]
    views = [session.bind({TEXT: f.pop(TEXT)}) for f in feeds]
    deep = [v.graph("deep")(f) for v, f in zip(views, feeds, strict=True)]
    for view, f, made, want in zip(views, feeds, deep, wanted, strict=True):
        found = view.graph("shallow1")({**f, "features1": made["features1"]})["out_sample"]
        assert deviations(found, want) <= MAX_ABS_F32


def test_a_graph_that_is_not_there(sessions):
    for name in ("shallow7", "prologue"):
        with pytest.raises(MissingPart, match=f"unet has no graph '{name}'; it has ") as caught:
            sessions("unet", sizes("unet")).graph(name)
        assert "sdengine export BUNDLE --out FOLDER" in caught.value.hint
    with pytest.raises(MissingPart, match="vae_decoder has no graph 'deep'; it has full"):
        sessions("vae_decoder", sizes("vae_decoder")).graph("deep")


def test_free_dimensions_are_fixed_by_what_is_bound(sessions, components):
    feeds = inputs(components["unet"], sizes("unet", 2))
    view = sessions("unet").bind({TEXT: feeds[TEXT]})
    other = inputs(components["unet"], sizes("unet", 1))
    with pytest.raises(FeedMismatch, match=r"'sample' has shape \[1, 4, 8, 16\], expected \[2, 4"):
        view({k: other[k] for k in ("sample", "timestep")})


WRONG = {
    "missing": (lambda f: f.pop("timestep"), "'timestep' is missing; given: sample, ", "it takes"),
    "unknown": (
        lambda f: f.update(timesteps=f.pop("timestep")),
        "unknown input 'timesteps'",
        "did you mean 'timestep'?",
    ),
    "extra": (lambda f: f.update(mask=f["sample"]), "unknown input 'mask'", "sample: float32[2, 4"),
    "dtype": (
        lambda f: f.update(sample=f["sample"].astype(np.float64)),
        "'sample' is float64, expected float32",
        ".astype(np.float32)",
    ),
    "byte order": (
        lambda f: f.update(sample=f["sample"].astype(">f4")),
        "'sample' is >f4, expected float32",
        ".astype(np.float32)",
    ),
    "shape": (
        lambda f: f.update(sample=f["sample"][:1]),
        "'sample' has shape [1, 4, 8, 16], expected [2, 4, 8, 16]",
        "f32 B2 T77 h8 w16",
    ),
    "rank": (
        lambda f: f.update(timestep=f["timestep"][:, None]),
        "'timestep' has shape [2, 1], expected [2]",
        "Profile",
    ),
    "no array": (
        lambda f: f.update(timestep=[1.0, 2.0]),
        "'timestep' is a list, not a numpy array",
        "np.asarray(value, dtype=np.float32)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_feeds_are_refused(case, sessions, components):
    spoil, message, hint = WRONG[case]
    session, feeds = sessions("unet", sizes("unet")), inputs(components["unet"], sizes("unet"))
    good = dict(feeds)
    spoil(feeds)
    with pytest.raises(FeedMismatch) as caught:
        session(feeds)
    assert caught.value.message.startswith("unet: ")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert session(good)["out_sample"].shape == (2, 4, 8, 16), "and the session goes on"


def test_sizes_must_agree_where_they_are_free(sessions, components):
    feeds = inputs(components["unet"], sizes("unet", 2))
    feeds["timestep"] = feeds["timestep"][:1]
    with pytest.raises(FeedMismatch, match="dimension B is 2 in 'sample' and 1 in 'timestep'"):
        sessions("unet")(feeds)


def test_held_inputs_are_refused(sessions, components):
    feeds = inputs(components["unet"], sizes("unet"))
    view = sessions("unet", sizes("unet")).bind({TEXT: feeds[TEXT]})
    with pytest.raises(FeedMismatch, match=f"{TEXT}' is held fixed by bind") as caught:
        view(feeds)
    assert "leave it out" in caught.value.hint
    with pytest.raises(FeedMismatch, match="held fixed"):
        view.bind({TEXT: feeds[TEXT]})


def test_bind_checks_like_a_call(sessions, components):
    session, feeds = sessions("unet", sizes("unet")), inputs(components["unet"], sizes("unet"))
    with pytest.raises(FeedMismatch, match="has shape"):
        session.bind({TEXT: feeds[TEXT][:1]})
    with pytest.raises(FeedMismatch, match="expected float32"):
        session.bind({TEXT: feeds[TEXT].astype(np.float16)})
    with pytest.raises(FeedMismatch, match="unknown input 'text'"):
        session.bind({"text": feeds[TEXT]})


def test_a_dimension_that_does_not_exist(backend, components):
    for dims, message in (
        ({"B": 1, "d": 3}, "dimension d = 3"),
        ({"B": 0}, "dimension B = 0"),
    ):
        with pytest.raises(FeedMismatch, match=message) as caught:
            backend.load(components["unet"], Profile(dims))
        assert "B, h, w" in caught.value.hint


def test_close(backend, components):
    dims = sizes("unet")
    session, feeds = backend.load(components["unet"], Profile(dims)), None
    feeds = inputs(components["unet"], dims)
    view, other = (session.bind({TEXT: feeds[TEXT]}) for _ in range(2))
    rest = {k: v for k, v in feeds.items() if k != TEXT}
    result = view(rest)["out_sample"]
    kept = result.copy()
    view.close()
    with pytest.raises(SessionClosed):
        view(rest)
    other(rest)
    session(feeds)  # a view's end is not the network's
    session.close()
    for closed, given in ((session, feeds), (other, rest), (view, rest)):
        with pytest.raises(
            SessionClosed, match=f"unet .{backend.name}, f32 B2 T77 h8 w16"
        ) as caught:
            closed(given)
        assert "load it again" in caught.value.hint
        with pytest.raises(SessionClosed):
            closed.bind({"timestep": feeds["timestep"]})
        closed.close()
        assert closed.spec.name == "unet"
    np.testing.assert_array_equal(result, kept, err_msg="results outlive their session")


def test_two_sessions_of_one_component_are_apart(backend, components):
    dims = sizes("vae_decoder")
    one, two = (backend.load(components["vae_decoder"], Profile(dims)) for _ in range(2))
    feeds = inputs(components["vae_decoder"], dims)
    (wanted,) = one(feeds).values()
    one.close()
    (found,) = two(feeds).values()
    np.testing.assert_array_equal(found, wanted)
    two.close()


def test_a_second_load_gives_the_same_numbers(backend, components, tmp_path, monkeypatch):
    """Whatever the backend keeps on the machine between two loads, and however it is spoiled."""
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path))
    dims = sizes("vae_decoder")
    feeds = inputs(components["vae_decoder"], dims)

    def once():
        session = backend.load(components["vae_decoder"], Profile(dims))
        (result,) = session(feeds).values()
        session.close()
        return result

    first = once()
    np.testing.assert_array_equal(once(), first)
    for kept in (p for p in tmp_path.rglob("*") if p.is_file()):
        data = bytearray(kept.read_bytes())
        data[len(data) // 2] ^= 0xFF
        kept.write_bytes(data)
    np.testing.assert_array_equal(once(), first)
