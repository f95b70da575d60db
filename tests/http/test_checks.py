"""What is refused before it takes a place in the queue. No server is needed."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from sdengine import api
from sdengine.engine.errors import RequestError
from sdengine.engine.request import Request
from sdengine.serve.app import create_app
from sdengine.serve.asks import Ask, Pictures
from sdengine.serve.checks import check, size_of
from sdengine.serve.config import Config, Limits
from sdengine.serve.models import Models

PATHS = {"emoji": api.EMBEDDED["emoji"]}


def test_pictures_are_counted_before_one_is_read():
    ask = Ask("emoji", Request(), Pictures((b"no picture",) * 5000))
    with pytest.raises(RequestError, match="5000 given") as caught:
        check(ask, Models(PATHS).find(None).facts, Limits())
    assert "--image" in caught.value.hint


def test_an_icon_is_refused():
    """Its directory states one size, the PNG in it has another."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "ICO")
    with pytest.raises(RequestError, match="format ICO") as caught:
        size_of(out.getvalue(), 2**24)
    assert "PNG" in caught.value.hint


def test_pillow_has_the_servers_limit_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    create_app(Config(PATHS, limits=Limits(given=1000, pixels=2000)))
    assert Image.MAX_IMAGE_PIXELS == 2000
