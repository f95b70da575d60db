"""What a run will hold: against counts of numbers made by hand, and told before anything loads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sdengine import api
from sdengine.backends import machine
from sdengine.engine import footprint, memory
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import NotEnoughMemory
from sdengine.engine.footprint import Loading, Need, check, need
from sdengine.engine.weights import read_header

MB = 10**6


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture(scope="module")
def table(bundle):
    """Of 4 guided rows, through the pipeline's own way of making one."""
    from sdengine.engine.given import Given
    from sdengine.engine.request import Request
    from sdengine.engine.setup import set_up
    from sdengine.engine.tasks import choose

    task = choose(bundle.facts, None, Given())
    request = Request(prompt="x", steps=4).completed(task.name, bundle.facts.native_size)
    return set_up(task, bundle, request, Given(), None).table


WHOLE = memory.Plan(None, None, "")
FLOAT = Loading("f32")


def count(bundle, name):
    header = read_header(bundle.components[name].weights)
    return sum(math.prod(t.shape) for t in header.values())


@pytest.mark.parametrize(("precision", "width"), [("f32", 4), ("bf16", 2), ("f16", 2)])
def test_weights_are_counted_in_the_precision_that_runs(bundle, precision, width):
    for name, component in bundle.components.items():
        assert footprint.weight_bytes(component, precision) == width * count(bundle, name)


def test_an_int8_network_is_as_large_as_its_file(bundle, tmp_path):
    """Bytes by the file's header: two int8 weights of 6, one float32 of 1."""
    import json
    import struct

    header = json.dumps(
        {
            "a": {"dtype": "I8", "shape": [2, 3], "data_offsets": [0, 6]},
            "b": {"dtype": "I8", "shape": [6], "data_offsets": [6, 12]},
            "s": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
        }
    ).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    unet = bundle.components["unet"]
    twin = replace(unet, quantised={"int8": replace(unet, weights=path)})
    assert footprint.weight_bytes(twin, "int8") == 16


def test_one_at_a_time_is_the_largest_part():
    parts = {"text_encoder": 3 * MB, "unet": 20 * MB, "vae_decoder": 9 * MB}
    assert Need(parts, False).total == footprint.BASE + 32 * MB
    assert Need(parts, True).total == footprint.BASE + 20 * MB


def test_what_makes_a_run_larger(bundle, table):
    def total(loading=FLOAT, size=(16, 16), plan=WHOLE, **options):
        return need(bundle, loading, table, size, plan, **options).parts

    plain = total()
    assert plain["unet"] > footprint.weight_bytes(bundle.components["unet"], "f32")
    assert total(Loading("bf16"))["unet"] == pytest.approx(plain["unet"] / 2, rel=1e-6)
    weights = footprint.weight_bytes(bundle.components["unet"], "f32")
    active = plain["unet"] - weights
    assert total(batch=4)["unet"] - weights == 4 * active
    assert total(together=False)["unet"] - weights == active // 2
    assert total(size=(32, 32))["unet"] - weights == 4 * active
    tiled = total(size=(64, 64), plan=memory.Plan(16, 16, ""))
    assert tiled == plain, "a tile is what the networks see"


def test_a_picture_in_bands_needs_its_maps_beside_a_tile(bundle, table):
    """Two half-precision maps of 2048x2048 pixels, 32 wide, lie beside what one tile needs."""
    cuts = {"vae_decoder": ("inner",)}
    blended, banded = (
        need(bundle, FLOAT, table, (256, 256), memory.Plan(32, None, "", c)).parts["vae_decoder"]
        for c in ({}, cuts)
    )
    assert banded - blended >= 2 * 32 * 2 * 2048**2


def test_every_compiled_shape_has_its_own_weights(bundle, table):
    """Rows with and without guidance are two shapes, unless the halves go apart."""
    mixed = replace(table, guidance=table.guidance.copy())
    mixed.guidance[-1] = 1.0
    weights = footprint.weight_bytes(bundle.components["unet"], "f32")
    one, two, apart = (
        need(bundle, Loading("f32"), t, (16, 16), WHOLE, together=together).parts["unet"]
        for t, together in ((table, True), (mixed, True), (mixed, False))
    )
    assert two - one == weights
    assert apart < one


def test_too_little_is_an_error_that_says_how_much_and_what_to_do(bundle):
    parts = {"text_encoder": 700 * MB, "unet": 2000 * MB, "vae_decoder": 500 * MB}
    asked = Need(parts, False)
    check(bundle, asked, Loading("bf16"), asked.total)
    check(bundle, asked, Loading("bf16"), None)
    with pytest.raises(NotEnoughMemory) as caught:
        check(bundle, asked, Loading("bf16"), 2500 * MB)
    assert caught.value.message == (
        "this run needs about 3.4 GB of memory in bf16 (text_encoder 0.7 GB, unet 2.0 GB,"
        " vae_decoder 0.5 GB); 2.5 GB are available"
    )
    hint = caught.value.hint
    assert hint.startswith("try --low-memory (about 2.2 GB), or a smaller --width and --height, or")
    assert "--precision int8 (made by: sdengine export" in hint
    assert caught.value.exit_code == 2


def test_no_advice_that_would_not_help(bundle):
    asked = Need({"unet": 2000 * MB, "vae_decoder": 500 * MB}, False)
    with pytest.raises(NotEnoughMemory) as caught:
        check(bundle, asked, Loading("int8"), 1000 * MB)
    assert caught.value.hint == (
        "try a smaller --width and --height; or close other programs, or raise the container's"
        " limit"
    )


def test_it_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 210 * MB)
    pipe = api.load(precision="f32", threads=1)
    monkeypatch.setattr(pipe, "_sessions", None)  # nothing can be loaded
    with pytest.raises(NotEnoughMemory, match=r"this run needs about 0\.\d GB of memory in f32"):
        pipe(prompt="a fox", steps=1, tile="off")
