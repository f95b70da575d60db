"""The reference's arrays: pictures prepared for networks, latent masks, the invisible mark."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sdengine.engine import inputs, prepare, watermark


@pytest.mark.parametrize("number", range(3))
def test_depth_network_input(golden, number):
    """Two float32 orders of summation of values up to 1: 2e-6."""
    case, arrays = golden("depth_prepare")
    item = case["items"][number]
    pixels = inputs.pixels_of(Image.fromarray(arrays[item["image"]]))
    made = prepare.for_depth(pixels)
    assert made.shape == (1, 3, item["net_height"], item["net_width"])
    assert made.dtype == np.float32
    np.testing.assert_allclose(made[0, :, ::8, ::8], arrays[item["sampled"]], atol=2e-6)
    assert (made.min(), made.max()) == pytest.approx((item["min"], item["max"]), abs=2e-6)


@pytest.mark.parametrize("number", range(3))
def test_image_encoder_input(golden, number):
    """torch computes the places to sample in float32: up to 9e-6 of values up to 2.2."""
    case, arrays = golden("clip_prepare")
    config = case["config"]
    picture = arrays[f"in.image{number}_u8"].astype(np.float32).transpose(2, 0, 1)
    pixels = picture / np.float32(255) * 2 - 1  # as that case was made
    made = prepare.for_image_encoder(pixels, config["size"], config["mean"], config["std"])
    assert made.shape == (1, 3, 224, 224)
    assert made.dtype == np.float32
    every = arrays[f"out.net_input{number}_every8"]
    np.testing.assert_allclose(made[0, :, ::8, ::8], every, atol=1.5e-5)
    np.testing.assert_allclose(
        made[0, :, 100], arrays[f"out.net_input{number}_row100"], atol=1.5e-5
    )


def test_depth_condition(golden):
    arrays = golden("depth_small")[1]
    for prediction, want in zip(arrays["out.prediction"], arrays["out.depth_latent"], strict=True):
        made = prepare.depth_condition(prediction[0], want.shape[1:])
        np.testing.assert_allclose(made, want, atol=1e-6)


def test_depth_network_size_in_a_pipeline(golden):
    case, arrays = golden("pipeline_depth2img")
    height, width = arrays["in.image_u8"].shape[:2]
    assert list(prepare.depth_size(height, width)) == case["settings"]["depth_net_size"]


def test_latent_mask(golden):
    """The grey mask of the inpainting chain, with 0, 127, 128 and 255 in it."""
    arrays = golden("pipeline_inpainting")[1]
    picture, mask = Image.fromarray(arrays["in.image_u8"]), arrays["in.mask_u8"]
    assert {0, 127, 128, 255} <= set(np.unique(mask))
    placed = inputs.place(picture, width=None, height=None, resize="fit", multiple=64, least=64)
    opened = inputs.open_mask(mask, placed.size)
    network = inputs.place_mask(opened, placed).network
    made = inputs.latent_mask(network, 8, thin="nearest")
    np.testing.assert_array_equal(made, arrays["out.latent_mask"][0])


@pytest.fixture(scope="module")
def marked(golden_file):
    """`marked(name) -> (facts, before, after)`."""
    case = json.loads(golden_file("cases/watermark.json").read_text())

    def find(name: str):
        item = next(i for i in case["items"] if i["name"] == name)
        pixels = [
            np.asarray(Image.open(golden_file(f"cases/{item[when]}")))
            for when in ("before", "after")
        ]
        return item, *pixels

    return find


@pytest.mark.parametrize("name", list("abcd"))
def test_the_mark_is_the_originals(marked, name):
    _, before, after = marked(name)
    np.testing.assert_array_equal(watermark.encode(before), after)


@pytest.mark.parametrize("name", list("abcd"))
def test_the_mark_is_read_as_the_original_reads_it(marked, name):
    item, before, after = marked(name)
    bits, text = watermark.decode(after)
    assert bits == item["decoded_bits"]
    assert np.packbits(bits).tobytes().hex() == item["decoded_bytes_hex"]
    assert text == ("SDV2" if watermark.agreeing(bits) >= 26 else None)
    assert watermark.decode(before) == (item["bits_decoded_from_before"], None)


def test_the_size_that_the_original_refuses(golden_file):
    small = json.loads(golden_file("cases/watermark.json").read_text())["too_small"]
    assert not watermark.fits(small["height"], small["width"])
    assert watermark.fits(256, 256)
