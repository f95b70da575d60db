"""The page takes no path and no address from a request: what stands before Gradio, alone."""

from __future__ import annotations

import asyncio
import json

import pytest

from sdengine.serve.own_files import OwnFiles


@pytest.fixture
def ask(tmp_path):
    """(status, whether the page was reached) of one request."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "ours.png").write_bytes(b"")
    (tmp_path / "token").write_text("secret")
    (home / "link").symlink_to(tmp_path / "token")
    reached = []

    async def page(scope, receive, send):
        reached.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def run(path, body=None):
        sent = []
        scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path}

        async def receive():
            return {"type": "http.request", "body": body or b"", "more_body": False}

        async def send(message):
            sent.append(message)

        reached.clear()
        asyncio.run(OwnFiles(page, home)(scope, receive, send))
        assert not reached or reached[0]["body"] == (body or b"")
        return sent[0]["status"], bool(reached)

    run.home = home
    return run


def test_a_file_of_ours_is_given_out(ask):
    assert ask(f"/gradio_api/file={ask.home}/ours.png") == (200, True)
    assert ask("/") == (200, True)
    assert ask("/gradio_api/upload", b"--boundary\r\nanything") == (200, True)


@pytest.mark.parametrize(
    "named",
    ["/etc/hostname", "{home}/../token", "{home}/link", "token", "http://127.0.0.1:1/x",
     "https://example.org/a.png", "file:///etc/hostname", "{home}\0", ""],
)  # fmt: skip
def test_any_other_is_refused(ask, named):
    named = named.format(home=ask.home)
    assert ask(f"/gradio_api/file={named}") == (403, False)
    assert ask(f"/file={named}") == (403, False)
    value = {"data": [None, {"image": {"path": named, "meta": {"_type": "gradio.FileData"}}}]}
    assert ask("/gradio_api/queue/join", json.dumps(value).encode()) == (403, False)


def test_nothing_is_fetched_for_others(ask):
    assert ask("/gradio_api/proxy=https://example.org/") == (403, False)


def test_a_body_that_cannot_be_looked_through_is_refused(ask):
    assert ask("/gradio_api/queue/join", b"[" * 100_000) == (403, False)
    assert ask("/gradio_api/queue/join", b'{"data": [') == (403, False)


def test_a_path_of_ours_may_be_named(ask):
    value = {"data": [{"path": f"{ask.home}/ours.png"}]}
    assert ask("/gradio_api/queue/join", json.dumps(value).encode()) == (200, True)
