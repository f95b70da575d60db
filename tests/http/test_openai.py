"""The whole images surface of the client package `openai`, with the embedded model."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import sdengine


@pytest.fixture(scope="module")
def client(emoji: Any) -> Any:
    with openai.OpenAI(base_url=f"{emoji.url}/v1", api_key="none", max_retries=0) as found:
        yield found


FEW = {"extra_body": {"steps": 2, "seed": 5}}


def opened(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_generations(client):
    result = client.images.generate(prompt="a red heart", n=2, size="128x128", **FEW)
    assert len(result.data) == 2
    assert result.size == "128x128"
    with sdengine.load("emoji", threads=1) as pipe:
        own = pipe(prompt="a red heart", steps=2, seed=5, long_prompt=True)
    assert np.array_equal(np.asarray(opened(result.data[0].b64_json)), np.asarray(own.image))


@pytest.mark.parametrize(("kind", "format"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, kind, format):
    result = client.images.generate(
        prompt="x", output_format=kind, output_compression=60, size="auto", **FEW
    )
    assert opened(result.data[0].b64_json).format == format


def test_addresses(client):
    result = client.images.generate(prompt="x", response_format="url", **FEW)
    response = httpx.get(result.data[0].url)
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.size == (128, 128)
    assert httpx.get(f"{client.base_url}images/files/none.png").status_code == 404


def test_streaming(client):
    kinds = []
    stream = client.images.generate(
        prompt="x", stream=True, partial_images=2, extra_body={"steps": 8, "seed": 5}
    )
    for event in stream:
        kinds.append(event.type)
        assert opened(event.b64_json).size == (128, 128)
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_edits(client):
    image = Image.new("RGB", (128, 128), "gold")
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    result = client.images.edit(
        image=("a.png", png(image)), mask=("m.png", png(mask)), prompt="a cat", **FEW
    )
    made = np.asarray(opened(result.data[0].b64_json))
    assert np.array_equal(made[:, :64], np.asarray(image)[:, :64])
    assert not np.array_equal(made[:, 64:], np.asarray(image)[:, 64:])
    whole = client.images.edit(image=[png(image)], prompt="a cat", size="64x64",
                               extra_body={"steps": 4, "strength": 0.5})  # fmt: skip
    assert opened(whole.data[0].b64_json).size == (64, 64)


def test_variations(client):
    image = png(Image.new("RGB", (128, 128), "gold"))
    with pytest.deprecated_call():  # by its maker, with the model that it was for
        result = client.images.create_variation(image=image, n=2, **FEW)
    assert len(result.data) == 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").owned_by == "sdengine"
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
        client.images.generate(prompt="x", model="dall-e-3")


@pytest.mark.parametrize(
    ("fields", "says", "param"),
    [
        ({"size": "big"}, "512x768", None),
        ({"n": 0}, "1 to 10000", None),
        ({"extra_body": {"step": 3}}, "Extra inputs", "step"),
        ({"extra_body": {"seed": "x"}}, "seed", "seed"),
        ({"extra_body": {"sampler": "nope"}}, "unknown sampler", None),
        ({"background": "transparent"}, "background", "background"),
        ({"extra_body": {"solver": "/etc/passwd"}}, "Extra inputs", "solver"),
    ],
)
def test_refusals_have_its_shape(client, fields, says, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", **fields)
    error = caught.value
    assert says in error.message
    assert error.type == "invalid_request_error"
    assert error.param == param


def test_refusals_of_forms(client):
    url = f"{client.base_url}images/edits"
    form = {"prompt": "x"}
    for call, says in (
        ({"data": form}, "not multipart"),
        ({"files": {"prompt": (None, "x")}}, "no file called 'image'"),
        ({"data": {**form, "image": "http://127.0.0.1/"}, "files": {"mask": b"x"}}, "not opened"),
        ({"data": form, "files": {"image": b"x"}}, "no known picture"),
        ({"data": {**form, "n": "many"}, "files": {"image": b"x"}}, "n: "),
        ({"data": form, "files": {"video": b"x"}}, "no file called 'video'"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
         "form cannot be read"),
    ):  # fmt: skip
        response = httpx.post(url, **call)
        assert response.status_code == 400, response.text
        assert says in response.json()["error"]["message"]
    large = {"image": png(Image.new("1", (8000, 8000)))}
    response = httpx.post(url, data=form, files=large)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
