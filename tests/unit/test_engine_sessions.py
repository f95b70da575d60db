"""EngineSessions: one network at a time, and networks that are loaded ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendError, MissingPart, SessionClosed
from sdengine.engine.pipeline import Pipeline

UNET = {"B": 2, "T": 77, "h": 16, "w": 16}


class Watched(Fake):
    """Notes what is loaded, in which thread, and which sessions are open together."""

    def __init__(self) -> None:
        super().__init__(prediction="v")
        self.loaded: list[tuple[str, dict[str, int], str]] = []
        self.open: set[str] = set()
        self.closed: list[str] = []
        self.most: int = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fails: str | None = None

    def load(self, component, profile):
        name = component.spec.name
        assert self.gate.wait(10)
        self.loaded.append((name, dict(profile.dims), threading.current_thread().name))
        if name == self.fails:
            raise BackendError(f"{name} cannot be loaded", hint="another time")
        session = super().load(component, profile)
        self.open.add(name)
        self.most = max(self.most, len(self.open))
        close = session.close

        def closing() -> None:
            self.open.discard(name)
            self.closed.append(name)
            close()

        session.close = closing
        return session


@pytest.fixture
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


@pytest.fixture
def backend():
    return Watched()


def sessions(bundle, backend, **options):
    return api.EngineSessions(bundle, backend, "f32", None, **options)


ASKED = {"prompt": "a fox", "steps": 2, "seed": 3}


def test_one_network_at_a_time(bundle, backend):
    """The same picture, bit for bit, with one network open where there were three."""
    plain = Watched()
    with Pipeline(bundle, sessions(bundle, plain), {}) as pipe:
        wanted = pipe(**ASKED, count=2, batch_size=1)
    with Pipeline(bundle, sessions(bundle, backend, low_memory=True), {}) as pipe:
        made = pipe(**ASKED, count=2, batch_size=1)
    for one, other in zip(wanted.pictures, made.pictures, strict=True):
        np.testing.assert_array_equal(one.latent, other.latent)
    assert (plain.most, backend.most) == (3, 1)
    order = [name for name, *_ in backend.loaded]
    assert order == ["text_encoder", "unet", "vae_decoder", "unet", "vae_decoder"]
    assert backend.open == set()


def test_a_network_is_gone_when_the_next_is_asked_for(bundle, backend):
    held = sessions(bundle, backend, low_memory=True)
    text = held("text_encoder", {"B": 1})
    held("unet", UNET)
    with pytest.raises(SessionClosed):
        text({"input_ids": np.zeros((1, 77), np.int64)})
    assert held("unet", UNET) is held("unet", UNET)


def test_one_network_may_be_held_in_two_shapes(bundle, backend):
    """As guidance does whose rows take one half or both, by turns."""
    held = sessions(bundle, backend, low_memory=True)
    one, both = held("unet", UNET), held("unet", {**UNET, "B": 1})
    assert (held("unet", UNET), held("unet", {**UNET, "B": 1})) == (one, both)
    assert len(backend.loaded) == 2


def test_what_is_expected_is_loaded_beside(bundle, backend):
    held = sessions(bundle, backend)
    backend.gate.clear()
    held.expect("unet", UNET)
    held.expect("unet", UNET)
    assert backend.loaded == [], "the caller goes on while it is loaded"
    backend.gate.set()
    unet = held("unet", UNET)
    assert backend.loaded == [("unet", UNET, "sdengine-load-unet")]
    assert held("unet", UNET) is unet
    held.close()
    assert backend.open == set()


def test_what_was_expected_and_never_asked_for_is_closed(bundle, backend):
    held = sessions(bundle, backend)
    held.expect("unet", UNET)
    held.close()
    assert [name for name, *_ in backend.loaded] == ["unet"]
    assert backend.open == set()


def test_what_a_failed_run_expected_makes_room(bundle, backend):
    """Runs of many sizes that fail before their first step must not pile up networks."""
    held = sessions(bundle, backend)
    held.expect("unet", UNET)
    held.expect("vae_decoder", {"B": 1, "h": 16, "w": 16})
    assert held("vae_decoder", {"B": 1, "h": 16, "w": 16}) is not None
    for side in (24, 32):
        held.expect("unet", {**UNET, "h": side})
    unet = held("unet", {**UNET, "h": 32})
    for thread in threading.enumerate():
        if thread.name.startswith("sdengine-load"):
            thread.join(10)
    assert len(backend.loaded) == 4
    assert backend.closed == ["unet", "unet"], "those of the two runs before"
    assert held("unet", {**UNET, "h": 32}) is unet
    held.close()
    assert sorted(backend.closed) == ["unet", "unet", "unet", "vae_decoder"]


def test_a_failure_ahead_is_raised_where_the_network_is_asked_for(bundle, backend):
    backend.fails = "unet"
    held = sessions(bundle, backend)
    held.expect("unet", UNET)
    with pytest.raises(BackendError, match="unet cannot be loaded") as caught:
        held("unet", UNET)
    assert caught.value.hint == "another time"
    held.expect("vae_decoder", {"B": 1, "h": 16, "w": 16}, "no such graph")
    with pytest.raises(MissingPart, match="has no graph 'no such graph'"):
        held("vae_decoder", {"B": 1, "h": 16, "w": 16})
    assert backend.open == set()


def test_one_at_a_time_loads_nothing_ahead(bundle, backend):
    held = sessions(bundle, backend, low_memory=True)
    held.expect("unet", UNET)
    assert backend.loaded == []


@pytest.mark.parametrize(
    ("asked", "dims"),
    [
        ({}, {"B": 2, "T": 77, "h": 16, "w": 16}),
        ({"guidance": 1.0}, {"B": 1, "T": 77, "h": 16, "w": 16}),
        ({"halves": "apart", "count": 2, "batch_size": 2}, {"B": 2, "h": 16, "w": 16}),
        ({"count": 3, "batch_size": 3, "width": 64}, {"B": 6, "h": 16, "w": 8}),
        ({"preset": "balanced"}, {"h": 16, "w": 16}),
    ],
    ids=str,
)
def test_a_run_expects_the_very_network_that_it_asks_for(bundle, backend, asked, dims):
    """Else a second shape would be compiled: one load of the UNet, ahead."""
    with Pipeline(bundle, sessions(bundle, backend), {}) as pipe:
        pipe(**(ASKED | asked))
    (loaded,) = [(d, thread) for name, d, thread in backend.loaded if name == "unet"]
    assert dims.items() <= loaded[0].items()
    assert loaded[1] == "sdengine-load-unet"
