"""Jobs over HTTP, on networks with known answers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image


def events(client: Any, place: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    """What the stream said, until the server ended it."""
    found, kind = [], ""
    with client.stream("GET", place, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
    return found


def test_a_job_is_followed_to_its_pictures(fake):
    with fake.client() as client:
        ask = {"prompt": "a fox", "steps": 3, "seed": 7, "count": 3, "batch_size": 2}
        response = client.post("/jobs", json={"request": ask})
        assert response.status_code == 202
        job = response.json()
        assert response.headers["location"] == f"/jobs/{job['id']}"
        told = events(client, job["events"])
        kinds = [kind for kind, _ in told]
        assert kinds == ["queued", "started", *["step"] * 3, "picture", "picture",
                         *["step"] * 3, "picture", "done"]  # fmt: skip
        assert [f["step"] for kind, f in told if kind == "step"] == [1, 2, 3, 1, 2, 3]
        assert [f["seed"] for kind, f in told if kind == "picture"] == [7, 8, 9]
        over = client.get(f"/jobs/{job['id']}").json()
        assert (over["state"], over["progress"], over["seeds"]) == ("done", 1.0, [7, 8, 9])
        for kind, name in (("PNG", "0.png"), ("JPEG", "1.jpeg"), ("WEBP", "2.webp")):
            data = client.get(f"/jobs/{job['id']}/pictures/{name}").content
            with Image.open(io.BytesIO(data)) as image:
                assert (image.format, image.size) == (kind, (128, 64))


def test_a_reader_goes_on_where_it_was(fake):
    with fake.client() as client:
        job = client.post("/jobs", json={"request": {"prompt": "x", "steps": 2}}).json()
        whole = events(client, job["events"])
        rest = events(client, job["events"], **{"Last-Event-ID": "2"})
        for _, fields in whole:
            fields.pop("preview", None)  # of the newest step alone, and while it runs
        assert [kind for kind, _ in rest] == ["step", "picture", "done"]
        assert rest == whole[3:]


def test_a_run_is_seen_on_its_way(fake):
    """A run long enough to be met while it lasts: only the newest step has a picture."""
    with fake.client() as client:
        ask = {"prompt": "x", "steps": 150, "sampler": "restart", "count": 16}
        job = client.post("/jobs", json={"request": ask}).json()
        with client.stream("GET", job["events"]) as response:
            data = (line for line in response.iter_lines() if line.startswith("data: "))
            told = (json.loads(line.removeprefix("data: ")) for line in data)
            preview = next(fields["preview"] for fields in told if "preview" in fields)
        with Image.open(io.BytesIO(base64.b64decode(preview))) as image:
            assert image.size == (16, 8)
        assert client.delete(f"/jobs/{job['id']}").json()["state"] == "cancelled"


def test_a_job_that_is_called_off_ends(fake):
    with fake.client() as client:
        ask = {"prompt": "x", "steps": 150, "sampler": "restart", "count": 16}
        job = client.post("/jobs", json={"request": ask}).json()
        gone = client.delete(f"/jobs/{job['id']}").json()
        assert gone["state"] == "cancelled"
        assert gone["error"]["kind"] == "Cancelled"
        after = client.post("/jobs", json={"request": {"prompt": "y", "steps": 1}}).json()
        assert events(client, after["events"])[-1][0] == "done"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"request": {"promt": "x"}}, 400, "'prompt'"),
        ({"request": {"prompt": "x", "steps": 0}}, 400, "1 to 1000"),
        ({"request": {"prompt": "x", "steps": 151}}, 413, "at most 150"),
        ({"request": {"prompt": "x", "width": 4096, "height": 4096}}, 413, "at most 2,359,296"),
        ({"request": {"prompt": "x", "count": 17}}, 413, "at most 16"),
        ({"request": {"solver": "/etc/passwd"}}, 400, "cannot be named in a request"),
        ({"request": {"task": "upscale"}}, 400, "cannot do upscale"),
        ({"request": {}, "model": "../../etc"}, 404, "there is no model"),
        ({"request": {}, "image": "/etc/passwd"}, 400, "paths are never opened"),
        ({"request": {}, "image": "http://127.0.0.1/a.png"}, 400, "never opened"),
        ({"request": {}, "image": "AAAA"}, 400, "no known picture format"),
        ({"request": {}, "images": []}, 422, "Extra inputs"),
        ({"request": 3}, 422, "dictionary"),
        ({"request": {}, "deadline_s": 0}, 422, "greater than 0"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(fake, body, status, says):
    with fake.client() as client:
        response = client.post("/jobs", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert says in error["message"] + " " + error["hint"]
    assert error["kind"]
    assert error["hint"]


def test_what_is_not_there(fake):
    with fake.client() as client:
        for place in ("/jobs/0123", "/jobs/0123/events", "/jobs/0123/pictures/0.png", "/nowhere"):
            response = client.get(place)
            assert response.status_code == 404
            assert response.json()["error"]["kind"] == "NotFound"
        assert client.delete("/jobs").status_code == 405
        job = client.post("/jobs", json={"request": {"steps": 1}}).json()
        assert events(client, job["events"])[-1][0] == "done"
        assert client.get(f"/jobs/{job['id']}/pictures/1.png").status_code == 404
        assert client.get(f"/jobs/{job['id']}/pictures/0.exe").status_code == 404


def test_health_and_metrics(fake):
    with fake.client() as client:
        assert client.get("/health/live").json()["live"] is True
        assert client.get("/health/ready").json()["workers"] == 1
        before = client.get("/metrics").text
        job = client.post("/jobs", json={"request": {"steps": 1, "count": 2}}).json()
        events(client, job["events"])
        after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    made = "sdengine_pictures_total "
    assert value(after, made) - value(before, made) == 2
    assert value(after, 'sdengine_stage_seconds_count{stage="denoise"}') > 0
    assert value(after, 'sdengine_memory_bytes{process="server"}') > 1e7
    assert value(after, "sdengine_queue_waiting ") == 0
