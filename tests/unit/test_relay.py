"""Serving on one backend while another builds: who answers when, and what becomes of failures."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from sdengine import api
from sdengine.backends.fake import Fake
from sdengine.backends.relay import Relay
from sdengine.engine.bundle import open_bundle
from sdengine.engine.errors import BackendError, SessionClosed
from sdengine.engine.pipeline import Pipeline
from sdengine.engine.spec import Profile


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(api.EMBEDDED["emoji"])


class Slow(Fake):
    """Builds when it is let to; `denoised` counts what its denoiser was asked."""

    name = "slow"

    def __init__(self, error=None):
        super().__init__()
        self.let, self.loaded, self.error = threading.Event(), threading.Event(), error
        self.closed, self.profiles = [], []

    def load(self, component, profile):
        self.profiles.append(profile)
        assert self.let.wait(10)
        if self.error is not None:
            self.loaded.set()
            raise self.error
        session = super().load(component, profile)
        close = session.close
        session.close = lambda: (self.closed.append(component.spec.name), close())[1]
        self.loaded.set()
        return session

    def probe_on(self, device):
        return self.probe()

    def denoiser(self, job):
        return None


def text(session):
    return session({"input_ids": np.zeros((1, 77), np.int64)})


def load(relay, bundle, name="text_encoder"):
    return relay.load(bundle.components[name], Profile({"B": 1}, "bf16", device="cuda:1"))


def wait_for(session):
    """Until the thread has handed its result over, just after `loaded`."""
    import concurrent.futures

    concurrent.futures.wait([session._later], 10)


def test_the_first_serves_until_the_second_is_built(bundle, caplog):
    caplog.set_level(logging.INFO, "sdengine.backends")
    now, later = Fake(), Slow()
    session = load(Relay(later, now), bundle)
    text(session)
    assert (now.calls["text_encoder"], later.calls["text_encoder"]) == (1, 0)
    later.let.set()
    wait_for(session)
    text(session)
    text(session)
    assert (now.calls["text_encoder"], later.calls["text_encoder"]) == (1, 2)
    assert [m for m in caplog.messages if "takes over" in m] == [
        "text_encoder: slow is built, and takes over"
    ]
    assert later.profiles == [Profile({"B": 1}, "bf16", device="cuda:1")]
    session.close()
    assert later.closed == ["text_encoder"]
    with pytest.raises(SessionClosed, match="text_encoder was closed"):
        text(session)


def test_a_run_that_began_on_one_ends_on_it(bundle):
    now, later = Fake(), Slow()
    relay = Relay(later, now)
    with Pipeline(bundle, api.EngineSessions(bundle, relay, "f32", 1), {}) as pipe:
        steps = []

        def on_step(progress):
            steps.append(progress)
            if len(steps) == 2:
                later.let.set()

        pipe(prompt="a", seed=1, steps=4, on_step=on_step)
        assert now.calls["unet"] == 4, "bound before it was built"
        assert later.calls["unet"] == 0
        for session in list(pipe._sessions._open.values()):
            wait_for(session)
        pipe(prompt="a", seed=1, steps=4)
        assert (now.calls["unet"], later.calls["unet"]) == (4, 4)


def test_a_build_that_fails_is_told_once_and_the_first_goes_on(bundle, caplog):
    now = Fake()
    later = Slow(BackendError("no room for 9 MiB", hint="end what else runs there"))
    session = load(Relay(later, now), bundle)
    later.let.set()
    wait_for(session)
    for _ in range(3):
        text(session)
    assert now.calls["text_encoder"] == 3
    (said,) = [m for m in caplog.messages if "could not be built" in m]
    assert "no room for 9 MiB; end what else runs there" in said
    session.close()


def test_what_is_closed_while_it_builds_is_closed_when_it_is_there(bundle):
    later = Slow()
    session = load(Relay(later, Fake()), bundle)
    session.close()
    session.close()
    later.let.set()
    wait_for(session)
    assert later.closed == ["text_encoder"]


def test_it_is_called_as_what_is_waited_for():
    relay = Relay(Slow(), Fake())
    assert relay.name == "slow"
    assert relay.probe().ok


@pytest.mark.ov
@pytest.mark.ort
def test_through_the_api(caplog):
    with api.load(backend="onnxruntime", while_building="openvino", threads=1) as pipe:
        result = pipe(prompt="a fox", steps=1, seed=0)
        assert pipe.about["backend"] == "onnxruntime"
        assert pipe.about["while_building"] == "openvino"
        for session in list(pipe._sessions._open.values()):
            wait_for(session)
        again = pipe(prompt="a fox", steps=1, seed=0)
    first, second = (np.asarray(r.image, float) for r in (result, again))
    assert np.abs(first - second).max() <= 3, "the same picture, by the other engine"
    assert not [m for m in caplog.messages if "could not be built" in m]
