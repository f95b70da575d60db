"""What the depth network and the image towers see, against torch; flat, thin and tiny pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdengine.engine.errors import NumericsError
from sdengine.engine.prepare import depth_condition, depth_size, for_depth, for_image_encoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPES = [(1, 1), (1, 5000), (5000, 1), (2, 3), (3, 900), (31, 33), (224, 224), (225, 2)]


def picture(height: int, width: int, seed: int = 3) -> np.ndarray:
    levels = np.random.default_rng(seed).integers(0, 256, (3, height, width))
    return (levels / 127.5 - 1).astype(np.float32)


class TestDepthSize:
    @pytest.mark.parametrize(
        ("size", "net"),
        [
            ((512, 768), (384, 576)),  # reference-spec 1.10
            ((512, 512), (384, 384)),
            ((64, 128), (192, 384)),
            ((384, 384), (384, 384)),
            ((400, 240), (384, 224)),
            ((48, 384), (64, 384)),  # 1.5 multiples: a half goes to the even one
            ((80, 384), (64, 384)),  # 2.5
        ],
    )
    def test_known(self, size, net):
        assert depth_size(*size) == net

    @pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (8, 4096), (4096, 15)])
    def test_no_side_is_rounded_away(self, size):
        """The reference computes a side of 0 here, and stops."""
        net = depth_size(*size)
        assert min(net) == 32
        assert max(net) == 384

    @given(st.integers(1, 8192), st.integers(1, 8192))
    def test_multiples(self, height, width):
        assert all(side >= 32 and side % 32 == 0 for side in depth_size(height, width))
        assert depth_size(width, height) == depth_size(height, width)[::-1] or height == width


class TestForDepth:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_any_picture(self, shape):
        made = for_depth(picture(*shape))
        assert made.shape == (1, 3, *depth_size(*shape))
        assert made.dtype == np.float32
        assert np.isfinite(made).all()
        assert np.abs(made).max() <= 1.6  # a cubic overshoots by at most an eighth a side

    @pytest.mark.parametrize("value", [-1.0, 0.25, 1.0])
    def test_flat_stays_flat(self, value):
        made = for_depth(np.full((3, 50, 70), value, np.float32))
        np.testing.assert_allclose(made, value, atol=1e-6)

    @pytest.mark.export
    @pytest.mark.parametrize("shape", [(64, 96), (500, 333), (700, 1200), (31, 33)])
    def test_as_torch_resizes(self, shape):
        """torch's bicubic has OpenCV's kernel, places and borders."""
        import torch

        pixels = picture(*shape)
        size = depth_size(*shape)
        unit = torch.from_numpy(pixels)[None] / 2 + 0.5
        want = torch.nn.functional.interpolate(unit.double(), size, mode="bicubic") * 2 - 1
        np.testing.assert_allclose(for_depth(pixels), want.numpy(), atol=2e-6)


class TestDepthCondition:
    @pytest.mark.export
    @pytest.mark.parametrize("depth", [(384, 576), (96, 32), (7, 5), (1000, 40)])
    @pytest.mark.parametrize("latent", [(64, 96), (8, 8), (1, 16)])
    def test_as_torch_and_the_scripts(self, depth, latent, rng):
        import torch

        values = (rng.random(depth) * 20).astype(np.float32)
        small = torch.nn.functional.interpolate(
            torch.from_numpy(values).double()[None, None], latent, mode="bicubic"
        )[0].numpy()
        want = 2 * (small - small.min()) / (small.max() - small.min()) - 1
        made = depth_condition(values, latent)
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, want, atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 1.0, 1e3 / 3, -7.7, 65535.0, 1e-30, 3e38])
    def test_a_flat_map_says_nothing(self, value):
        made = depth_condition(np.full((37, 51), value, np.float32), (8, 9))
        assert made.shape == (1, 8, 9)
        assert not made.any()

    def test_rounding_noise_is_not_stretched(self, rng):
        """A flat map that came out of float32 arithmetic."""
        noisy = (12.3 * (1 + 1e-7 * rng.standard_normal((64, 64)))).astype(np.float32)
        assert not depth_condition(noisy, (8, 8)).any()

    def test_the_smallest_step_of_a_picture_is_not_flat(self):
        for white in (255, 65535):
            depth = np.full((16, 16), white, np.float32)
            depth[:, :8] -= 1
            made = depth_condition(depth, (16, 16))
            assert (made.min(), made.max()) == (-1, 1)

    @settings(deadline=None, max_examples=80)
    @given(
        st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20),
        st.floats(1e-20, 1e20), st.floats(-10, 10),
    )  # fmt: skip
    def test_never_nan(self, height, width, tall, wide, scale, shift):
        noise = np.random.default_rng(height).random((height, width))
        made = depth_condition(((noise + shift) * scale).astype(np.float32), (tall, wide))
        assert np.isfinite(made).all()
        assert np.abs(made).max() <= 1

    def test_nearer_stays_larger(self):
        ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))
        made = depth_condition(ramp, (8, 8))[0]
        assert (np.diff(made, axis=1) > 0).all()
        assert (made[0, 0], made[0, -1]) == (-1, 1)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_holes(self, bad):
        depth = np.ones((4, 5), np.float32)
        depth[1, 1:3] = bad
        with pytest.raises(NumericsError, match="in 2 of 20 values") as caught:
            depth_condition(depth, (2, 2))
        assert "float32" in caught.value.hint


class TestForImageEncoder:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_any_picture(self, shape):
        made = for_image_encoder(picture(*shape), 224, MEAN, STD)
        assert made.shape == (1, 3, 224, 224)
        assert made.dtype == np.float32
        assert np.isfinite(made).all()

    def test_flat_is_normalised(self):
        made = for_image_encoder(np.full((3, 300, 100), 0.5, np.float32), 224, MEAN, STD)
        for channel in range(3):
            want = (0.75 - MEAN[channel]) / STD[channel]
            np.testing.assert_allclose(made[0, channel], want, atol=1e-5)

    def test_its_own_size_is_not_resampled(self):
        pixels = picture(224, 224)
        made = for_image_encoder(pixels, 224, (0.5,) * 3, (0.5,) * 3)
        np.testing.assert_allclose(made[0], pixels, atol=1e-6)

    @pytest.mark.export
    @pytest.mark.parametrize(
        "shape", [(64, 96), (256, 256), (330, 240), (225, 3), (512, 768), (1100, 230)]
    )
    def test_as_torch_blurs_and_resizes(self, shape):
        """The rule of reference-spec 1.9, in torch's own convolution and interpolation, float64."""
        import torch
        from torch.nn.functional import conv2d, interpolate, pad

        pixels = picture(*shape)
        x = torch.from_numpy(pixels).double()[:, None]
        if max(shape) > 224:
            for axis, side in enumerate(shape):
                sigma = max(side / 224, 1.0)
                taps = int(4 * sigma) + (int(4 * sigma) % 2 == 0)
                offset = torch.arange(taps, dtype=torch.float64) - taps // 2
                kernel = torch.tensor([math.exp(-(o**2) / (2 * sigma**2)) for o in offset])
                kernel = (kernel / kernel.sum()).double()
                margin = (0, 0, taps // 2, taps // 2) if axis == 0 else (taps // 2, taps // 2, 0, 0)
                shape2d = (1, 1, taps, 1) if axis == 0 else (1, 1, 1, taps)
                x = conv2d(pad(x, margin, mode="reflect"), kernel.reshape(shape2d))
        x = interpolate(x, (224, 224), mode="bicubic", align_corners=True)[:, 0]
        unit = x.numpy() / 2 + 0.5
        want = (unit - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(for_image_encoder(pixels, 224, MEAN, STD)[0], want, atol=1e-5)
