"""The reference's own pixels from the reference's own decoded picture."""

from __future__ import annotations

import numpy as np
import pytest

from sdengine.engine.images import to_uint8


@pytest.mark.parametrize("case", ["txt2img_eps", "txt2img_v", "img2img", "upscale_x4"])
def test_pixels_of_the_reference(golden, case):
    arrays = golden(f"pipeline_{case}")[1]
    decoded, pixels = arrays["out.decoded"], arrays["out.image_u8"]
    decoded = decoded.reshape(-1, *decoded.shape[-3:])
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    assert len(decoded) == len(pixels) > 0
    for picture, want in zip(decoded, pixels, strict=True):
        np.testing.assert_array_equal(to_uint8(picture), want)
