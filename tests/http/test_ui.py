"""The web page in a real browser: what a person does with it, without the internet."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
LIMIT = 60_000  # milliseconds; a busy machine is slow
PICTURES = Path(__file__).parents[2] / "docs" / "images"
SHOTS = os.environ.get("SDENGINE_SCREENSHOTS")  # a folder that pictures of the page are put into

pytestmark = [pytest.mark.ov, pytest.mark.slow]
if not os.environ.get("CI"):
    needs = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
    pytestmark.append(needs)


@pytest.fixture(scope="module")
def server(start):
    server = start("--ui", "--threads", "1", "--batch", "1", ready=False)
    server.ready(120)
    return server


@pytest.fixture(scope="module")
def page(server):
    """The page in a browser; `asked` has the address of everything that it fetched."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(LIMIT)
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on(
            "response", lambda got: got.status >= 400 and page.wrong.append((got.status, got.url))
        )
        page.goto(server.url)
        yield page
        browser.close()


def tab(page, title, task):
    """Open a tab, and what it has under More."""
    page.get_by_role("tab", name=title, exact=True).click()
    panel = page.locator(f"#{task}-make").locator("xpath=ancestor::*[@role='tabpanel'][1]")
    panel.get_by_text("More", exact=True).click()


def fill(page, task, **fields):
    for name, value in fields.items():
        page.locator(f"#{task}-{name}").locator("textarea, input").first.fill(str(value))


def said(page, task, words):
    """Wait until the page says so; all that it says then."""
    from playwright.sync_api import TimeoutError

    box = page.locator(f"#{task}-said")
    try:
        box.get_by_text(re.compile(words)).first.wait_for()
    except TimeoutError:
        pytest.fail(f"{words!r} was never said; it says {box.inner_text()!r}")
    return box.inner_text()


def make(page, task, words="made in"):
    page.locator(f"#{task}-make").click()
    return said(page, task, words)


def shot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def test_a_prompt_becomes_a_picture_that_says_how_it_was_made(page):
    tab(page, "Text to picture", "txt2img")
    fill(page, "txt2img", prompt="a slice of pizza", steps=12, guidance=5, seed=0)
    assert "1 made in" in make(page, "txt2img")
    page.locator("#txt2img-made img").first.wait_for()
    shot(page, "page")


def test_what_makes_no_sense_is_said_with_what_to_do(page):
    for field, value, words, hint in (
        ("steps", "many", "steps is 'many'; a whole number was expected", "left empty"),
        ("width", "7", "width is 7; it must lie in 16 to 4096", "give width a value"),
    ):
        fill(page, "txt2img", **{field: value})
        assert hint in make(page, "txt2img", re.escape(words))
        fill(page, "txt2img", **{field: ""})


def test_a_run_is_seen_and_called_off(page):
    fill(page, "txt2img", steps=150, guidance=5)
    make(page, "txt2img", r"Step \d+ of 150")
    shot(page, "running")
    page.locator("#txt2img-cancel").click()
    assert "called off" in said(page, "txt2img", "called off")


def test_a_picture_becomes_another(page):
    tab(page, "Picture to picture", "img2img")
    fill(page, "img2img", prompt="a panda", steps=4, guidance=1)
    page.locator("#img2img-image input[type=file]").set_input_files(PICTURES / "fox.png")
    page.locator("#img2img-image img").first.wait_for()
    assert "1 made in" in make(page, "img2img")


def test_a_mask_is_painted(page):
    tab(page, "Inpainting", "inpaint")
    fill(page, "inpaint", prompt="a smile", steps=4, guidance=1)
    assert "put one into the field" in make(page, "inpaint", "no picture to paint on")
    page.locator("#inpaint-drawn input[type=file]").first.set_input_files(PICTURES / "face.png")
    canvas = page.locator("#inpaint-drawn canvas").first
    assert "paint over what" in make(page, "inpaint", "nothing is painted over")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 10, steps=8)
    page.mouse.up()
    assert "1 made in" in make(page, "inpaint")
    shot(page, "inpainting")


def test_what_no_model_can_do_says_which_would(page):
    page.get_by_role("tab", name="Upscale", exact=True).click()
    page.get_by_text("it takes one of kind x4-upscaler").wait_for()


def test_the_history_has_it_all(page):
    page.get_by_role("tab", name="History", exact=True).click()
    thumbnails = page.locator("#history-made .thumbnail-item")
    thumbnails.nth(2).wait_for()
    thumbnails.nth(2).click()
    how = page.locator("#history-how textarea")
    page.wait_for_function(
        "() => document.querySelector('#history-how textarea').value.includes('Seed: 0')"
    )
    assert how.input_value().startswith("a slice of pizza")
    shot(page, "history")


def test_no_file_of_the_machine_is_read(server, tmp_path):
    """What would be a file of the server's user, and an address, for the page's own functions."""
    secret = tmp_path / "secret.png"
    secret.write_bytes((PICTURES / "fox.png").read_bytes())
    with server.client() as client:
        functions = client.get("/config").json()["dependencies"]
        for name in (str(secret), "http://127.0.0.1:1/fox.png"):
            value = {"path": name, "meta": {"_type": "gradio.FileData"}}
            body = {"data": [value] * 12, "fn_index": functions[0]["id"], "session_hash": "x"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 403
            assert client.get(f"/gradio_api/file={name}").status_code == 403


def test_nothing_came_from_elsewhere_and_nothing_failed(page, server):
    """The last one: what the others fetched."""
    hosts = {url.split("/")[2] for url in page.asked if url.startswith("http")}
    assert hosts == {server.url.split("/")[2]}
    assert not page.wrong


def test_without_gradio_the_command_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('none', name='gradio')")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-c", "from sdengine.cli import main; main()", "serve", "--ui"]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert "the page needs the package gradio" in done.stderr
    assert "pip install 'sdengine[ui]'" in done.stderr
