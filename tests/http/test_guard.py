"""The door: tokens, origins, hosts, sizes."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from sdengine.engine.errors import RequestError, StorageError
from sdengine.serve.guard import loopback
from sdengine.serve.tokens import check_open, read_tokens

TOKEN = "a-long-token-of-one"


@pytest.fixture(scope="module")
def closed(start: Any, fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(f"# who may\n{TOKEN}\n\nanna:annas-password\n")
    file.chmod(0o600)
    server = start("--model", str(fake_bundle), "--backend", "fake", "--token-file", str(file),
                   "--max-body", "1")  # fmt: skip
    server.headers = {"Authorization": f"Bearer {TOKEN}"}
    return server


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (basic("anybody", TOKEN), 200),
        (basic("anna", "annas-password"), 200),
        (basic("berta", "annas-password"), 401),
        (basic("anna", ""), 401),
        ("Bearer annas-password", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Digest {TOKEN}", 401),
        ("Basic %%%", 401),
        ("Bearer", 401),
        ("", 401),
    ],
)
def test_who_may_come_in(closed, authorization, status):
    with closed.client() as client:
        headers = {"Authorization": authorization}
        response = client.get("/sdapi/v1/samplers", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"].startswith("Basic")
        assert "no token" in response.json()["detail"]


def test_every_route_is_closed_but_health_and_addresses(closed):
    with closed.client() as client:
        paths = list(client.get("/openapi.json").json()["paths"])
        assert len(paths) > 30
        client.headers.pop("Authorization")
        found = {path: client.get(path).status_code for path in [*paths, "/openapi.json", "/no"]}
    opened = {path for path, status in found.items() if status != 401}
    # the last are pictures under names that nobody can guess
    assert opened == {"/health/live", "/health/ready", "/v1/images/files/{name}"}
    assert found["/v1/images/files/{name}"] == 404


def test_its_clients_know_how_to_log_in(closed):
    import openai
    import webuiapi

    api = webuiapi.WebUIApi(
        baseurl=f"{closed.url}/sdapi/v1", username="anna", password="annas-password"
    )
    assert len(api.get_sd_models()) == 1
    with openai.OpenAI(base_url=f"{closed.url}/v1", api_key=TOKEN) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
    with (
        openai.OpenAI(base_url=f"{closed.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="no token") as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "evil.example"}, 403),  # a name that was made to point here
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(fake, headers, status):
    with fake.client() as client:
        response = client.get("/health/live", headers=headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["kind"] == "Forbidden"


def raw(server: Any, head: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    place = server.url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), 20) as link:
        link.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        response = http.client.HTTPResponse(link)
        response.begin()
        return response.status, json.loads(response.read())


def test_bodies_that_are_too_large(closed):
    head = f"POST /jobs HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\n"
    status, told = raw(closed, f"{head}Content-Length: {2**40}")
    assert (status, told["error"]["kind"]) == (413, "TooLarge")
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    status, told = raw(closed, f"{head}Transfer-Encoding: chunked", chunk * 17)
    assert (status, told["error"]["kind"]) == (413, "TooLarge")


def test_a_body_that_is_no_json(closed):
    with closed.client() as client:
        deep = client.post("/jobs", content="[" * 100_000,
                           headers={"Content-Type": "application/json"})  # fmt: skip
        number = client.post("/jobs", content='{"request": {"seed": ' + "9" * 5000 + "}}",
                             headers={"Content-Type": "application/json"})  # fmt: skip
        half = client.post("/jobs", content=b'{"request": {"prompt": "\\ud800", "steps": 1}}',
                           headers={"Content-Type": "application/json"})  # fmt: skip
        nan = client.post("/jobs", content='{"request": {"guidance": NaN}}',
                          headers={"Content-Type": "application/json"})  # fmt: skip
    for response in (deep, number, nan):
        assert response.status_code in (400, 422), response.text
        assert set(response.json()["error"]) >= {"kind", "message", "hint"}
    assert half.status_code in (202, 400)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("LOCALHOST", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False),
     ("", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(host, expected):
    assert loopback(host) is expected
    if expected:
        check_open(host, ())
        return
    with pytest.raises(RequestError, match="no token") as caught:
        check_open(host, ())
    assert "--token-file" in caught.value.hint
    check_open(host, (TOKEN,))


@pytest.mark.parametrize(
    ("content", "says"),
    [("# none\n\n", "holds no token"), ("short\n", "fewer than 8"), ("a:short\n", "fewer than 8")],
)
def test_token_files_that_are_none(tmp_path, content, says):
    (tmp_path / "t").write_text(content)
    with pytest.raises(RequestError, match=says) as caught:
        read_tokens(tmp_path / "t")
    assert "/dev/urandom" in caught.value.hint


def test_a_token_file_that_is_not_there_or_that_others_read(tmp_path, caplog):
    with pytest.raises(StorageError, match="cannot be read"):
        read_tokens(tmp_path / "none")
    (tmp_path / "t").write_text(TOKEN)
    (tmp_path / "t").chmod(0o644)
    assert read_tokens(tmp_path / "t") == (TOKEN,)
    assert "chmod 600" in caplog.text
