"""Bad days: workers that die and hang, clients that go, full disks, bundles that vanish."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

# about a second on the fake backend, in 300 network calls a picture
LONG = {"prompt": "long", "steps": 150, "sampler": "restart", "count": 6}
SHORT = {"prompt": "short", "steps": 2}


@pytest.fixture(scope="module")
def bundle(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be deleted."""
    return Path(shutil.copytree(fake_bundle, tmp_path_factory.mktemp("own") / "fake"))


@pytest.fixture(scope="module")
def frail(start: Any, bundle: Path) -> Any:
    return start("--model", str(bundle), "--backend", "fake", "--hang", "1", "--queue", "8",
                 "--deadline", "20", "--batch", "4")  # fmt: skip


def wait_for(what: Any, limit: float = 20.0) -> None:
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def metric(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def at_once(server: Any, bodies: list[dict[str, Any]], meanwhile: Any) -> list[httpx.Response]:
    """All answers of requests sent together, in order; `meanwhile` runs beside them."""

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, headers=server.headers
        ) as client:
            calls = [client.post("/v1/images/generations", json=body) for body in bodies]
            beside = asyncio.get_running_loop().run_in_executor(None, meanwhile)
            found = await asyncio.gather(*calls)
            await beside
            return found

    return asyncio.run(all_of_them())


def body(k: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"picture {k}", "seed": k, "steps": 100, "sampler": "restart", **fields}


def test_workers_are_killed_and_nothing_is_lost(frail):
    def kill() -> None:
        for _ in range(2):
            wait_for(lambda: metric(client, "sdengine_queue_running ") > 0)
            time.sleep(0.1)
            os.kill(frail.workers()[0], signal.SIGKILL)
            frail.ready()

    with frail.client() as client:
        before = metric(client, "sdengine_worker_restarts_total ")
        answers = at_once(frail, [body(k) for k in range(8)], kill)
        assert metric(client, "sdengine_worker_restarts_total ") == before + 2
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) <= {200, 500}, codes
    assert codes[200] >= 4  # a batch of four may have been lost twice
    for answer in answers:
        if answer.status_code == 500:
            assert "engine's process was lost" in answer.json()["error"]["message"]
    pictures = {a.json()["data"][0]["b64_json"] for a in answers if a.status_code == 200}
    assert len(pictures) == codes[200]


def test_a_worker_that_hangs_is_replaced_and_its_job_runs_again(frail):
    with frail.client() as client:
        job = client.post("/jobs", json={"request": LONG}).json()
        wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["step"] > 3)
        os.kill(frail.workers()[0], signal.SIGSTOP)
        wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["state"] == "done")
        over = client.get(f"/jobs/{job['id']}").json()
    assert over["attempts"] == 2
    assert len(over["pictures"]) == LONG["count"]
    assert "did not move for 1 s" in frail.log.read_text()


def test_a_client_that_goes_takes_its_job_along(frail):
    with frail.client() as client:
        before = metric(client, 'sdengine_jobs_total{state="cancelled"}')
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{frail.url}/v1/images/generations", timeout=0.3,
                           json={"prompt": "x", "n": 16, "steps": 150})  # fmt: skip
        wait_for(lambda: metric(client, 'sdengine_jobs_total{state="cancelled"}') == before + 3)
        wait_for(lambda: metric(client, "sdengine_queue_running ") == 0)
        assert client.post("/v1/images/generations", json=body(1)).status_code == 200


def test_a_full_queue_says_so_in_each_shape(frail):
    with frail.client() as client:
        jobs = [client.post("/jobs", json={"request": LONG}) for _ in range(10)]
        assert [job.status_code for job in jobs].count(202) >= 8
        refused = client.post("/jobs", json={"request": SHORT})
        theirs = client.post("/sdapi/v1/txt2img", json={})
        other = client.post("/v1/images/generations", json={"prompt": "x"})
        begun = time.monotonic()
        assert client.get("/health/live").status_code == 200
        assert time.monotonic() - begun < 1
        for job in jobs:
            if job.status_code == 202:
                client.delete(f"/jobs/{job.json()['id']}")
    for answer in (refused, theirs, other):
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
    assert refused.json()["error"]["kind"] == "QueueFull"
    assert theirs.json()["error"] == "QueueFull"
    assert other.json()["error"]["code"] == "queue_full"


def test_a_deadline(frail):
    with frail.client() as client:
        job = client.post("/jobs", json={"request": LONG, "deadline_s": 0.3}).json()
        wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["state"] == "failed")
        error = client.get(f"/jobs/{job['id']}").json()["error"]
        wait_for(lambda: metric(client, "sdengine_queue_running ") == 0)
    assert error["kind"] == "DeadlinePassed"
    assert "0.3 s" in error["message"]


def test_requests_of_one_shape_run_together(frail):
    name = 'sdengine_stage_seconds_count{stage="denoise"}'
    with frail.client() as client:
        runs, made = metric(client, name), metric(client, "sdengine_pictures_total ")
        blocker = client.post("/jobs", json={"request": LONG}).json()
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(client.post, "/v1/images/generations", json=body(k, steps=1))
                     for k in range(4)]  # fmt: skip
            wait_for(lambda: metric(client, "sdengine_queue_waiting ") == 4)
            client.delete(f"/jobs/{blocker['id']}")
            answers = [call.result() for call in calls]
        assert [answer.status_code for answer in answers] == [200] * 4
        wait_for(lambda: metric(client, "sdengine_queue_running ") == 0)
        assert metric(client, "sdengine_pictures_total ") - made in range(4, 4 + LONG["count"])
        extra = metric(client, "sdengine_pictures_total ") - made - 4  # of the one called off
        assert metric(client, name) - runs == 1 + extra


def renamed(bundle: Path, place: Path, name: str) -> Path:
    """A copy of a bundle that calls itself otherwise."""
    shutil.copytree(bundle, place)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["model"]["name"] = name
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def model_of(client: httpx.Client) -> str:
    answer = client.post("/sdapi/v1/txt2img", json={"steps": 1, "seed": 1})
    assert answer.status_code == 200, answer.text
    text = json.loads(answer.json()["info"])["infotexts"][0]
    return text.partition(" Model: ")[2].partition(",")[0]


def test_a_bundle_is_swapped_without_a_lost_request(frail, bundle, tmp_path):
    new = renamed(bundle, bundle.with_name("new"), "other")

    def swap() -> None:
        time.sleep(0.1)
        bundle.rename(bundle.with_name("old"))
        new.rename(bundle)

    with frail.client() as client:
        before = model_of(client)
        answers = at_once(frail, [body(k, steps=20) for k in range(8)], swap)
        assert [answer.status_code for answer in answers] == [200] * 8
        assert before != "other"
        assert model_of(client) == "other"


def test_a_bad_bundle_in_its_place_changes_nothing(frail, bundle):
    good = (bundle / "manifest.json").read_text()
    with frail.client() as client:
        open_now = model_of(client)
        broken = bundle / "manifest.json.new"
        broken.write_text("{}")
        broken.rename(bundle / "manifest.json")
        assert model_of(client) == open_now
    assert "the old one stays" in frail.log.read_text()
    (bundle / "manifest.json").write_text(good)


def test_a_bundle_is_deleted_underneath(frail, bundle):
    """What is open goes on; a new worker cannot start, says so, and starts when it is back."""
    away = bundle.with_name("away")
    with frail.client() as client:
        open_now = model_of(client)
        bundle.rename(away)
        assert model_of(client) == open_now
        os.kill(frail.workers()[0], signal.SIGKILL)
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        answer = client.post("/v1/images/generations", json=body(1))
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert answer.json()["error"]["type"] == "server_error"
        away.rename(bundle)
        frail.ready()
        assert model_of(client) == open_now


def test_a_disk_without_room(start, fake_bundle):
    """No file may grow: not the log, not the cache, no upload. Pictures are made all the same."""

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    server = start("--model", str(fake_bundle), "--backend", "fake", preexec=no_room)
    noise = os.urandom(2**20 * 3)
    from PIL import Image

    image = Image.frombytes("RGB", (1024, 1024), noise)
    place = fake_bundle.parent / "large.png"
    image.save(place)
    with server.client() as client:
        answer = client.post("/v1/images/edits", data={"prompt": "x", "steps": "4"},
                             files={"image": place.read_bytes()})  # fmt: skip
        assert answer.status_code == 200, answer.text
    assert server.stop() == 0


def test_told_to_stop_under_load(start, fake_bundle):
    """What can be finished is finished, the rest handed back; nothing is left behind."""
    server = start("--model", str(fake_bundle), "--backend", "fake", "--grace", "0.3",
                   "--batch", "1")  # fmt: skip
    children = server.workers()

    def stop() -> None:
        with server.client() as client:
            wait_for(lambda: metric(client, 'sdengine_jobs_total{state="done"}') >= 1)
        server.process.send_signal(signal.SIGTERM)

    answers = at_once(server, [body(k, n=4, steps=150) for k in range(8)], stop)
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}, codes
    for answer in answers:
        if answer.status_code == 503:
            assert "went down" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0
    assert server.process.wait(30) == 0
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_a_server_that_was_killed(start, fake_bundle):
    server = start("--model", str(fake_bundle), "--backend", "fake")
    (worker,) = server.workers()
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists()
             or " Z " in Path(f"/proc/{worker}/stat").read_text())  # fmt: skip


def test_a_port_that_is_taken(fake_bundle):
    import subprocess

    from .conftest import SDENGINE

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        found = subprocess.run([*SDENGINE, "serve", "--port", port, "--model", str(fake_bundle)],
                               capture_output=True, text=True, check=False)  # fmt: skip
    assert found.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in found.stderr
    assert "--port 0" in found.stderr
    assert found.stdout == ""


def test_told_to_stop_before_it_is_up(start, fake_bundle):
    server = start("--model", str(fake_bundle), "--backend", "fake", ready=False)
    assert server.stop() == 0
