"""The pieces of a network that was cut at its norms: read, and refused where they do not fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BadManifest
from sdengine.engine.spec import bands_of, signature

_spec = importlib.util.spec_from_file_location(
    "tiny_bundle", Path(__file__).parents[1] / "tiny_bundle.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

LATENT, IMAGE = tiny.tensor("latent", "B", 4, "h", "w"), tiny.tensor("image", "B", 3, "H", "W")
STATISTICS = tiny.tensor("statistics", "B", 2, 3)


def maps(name, channels, *sides):
    return tiny.tensor(name, "B", channels, *(sides if sides else ("h", "w")))


def pieces():
    """name -> (inputs, outputs) of a decoder with one block outside."""
    return {
        "inner": ([LATENT], [maps("x", 6)]),
        "outer0": ([maps("x", 6)], [maps("seen", 6, "H", "W")]),
        "outer1": ([maps("x", 6), STATISTICS], [maps("h", 4, "H", "W"), maps("skip", 4, "H", "W")]),
        "outer2": ([maps("h", 4), maps("skip", 4), STATISTICS], [maps("x", 4)]),
        "outer3": ([maps("x", 4), STATISTICS], [IMAGE]),
    }


def written(folder, graphs):
    """A tiny bundle whose decoder has these graphs beside `full`."""
    made = tiny.manifest()
    made["components"]["vae_decoder"] = tiny.component(
        "vae_decoder", [LATENT], [IMAGE], {"full": ([LATENT], [IMAGE]), **graphs}
    )
    files = tiny.contents(made)
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    made["files"] = tiny.listing(files)
    tiny.write_manifest(folder, made)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("SDENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_pieces_are_read_in_their_order_with_their_own_tensors(tmp_path: Path):
    bundle = open_bundle(written(tmp_path / "tiny", pieces()))
    decoder = bundle.component("vae_decoder")
    assert bands_of(decoder) == ("inner", "outer0", "outer1", "outer2", "outer3")
    assert bands_of(bundle.component("vae_encoder")) == ()
    found = signature(decoder, "outer2")
    assert [t.name for t in found.inputs] == ["h", "skip", "statistics"]
    assert [t.name for t in found.outputs] == ["x"]


def without(name):
    return lambda graphs: graphs.pop(name)


def put(name, inputs, outputs):
    return lambda graphs: graphs.update({name: (inputs, outputs)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("inner"), ("inner and outer0",)),
        (without("outer1"), ("inner and outer0 to outer2",)),
        (put("outer0", [STATISTICS, maps("x", 6)], [maps("seen", 6)]), ("outer0", "statistics")),
        (put("outer1", [maps("x", 5), STATISTICS], [maps("h", 4)]), ("outer1", "x of 6 channels")),
        (put("outer2", [maps("y", 4), STATISTICS], [maps("x", 4)]), ("outer2", "h of 4", "y")),
        (put("outer3", [maps("x", 4), STATISTICS], [maps("x", 3)]), ("image", "'x'")),
        (put("outer2", [tiny.tensor("h", "B")], [tiny.tensor("x", "B")]), ("outer2.inputs",)),
    ],
)
def test_pieces_that_do_not_lead_from_one_to_the_next(tmp_path: Path, change, words):
    graphs = pieces()
    change(graphs)
    with pytest.raises(BadManifest) as caught:
        open_bundle(written(tmp_path / "tiny", graphs))
    for word in words:
        assert word in caught.value.message
    assert "export" in caught.value.hint
