"""PSNR and SSIM against their definitions and against known answers."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.errors import UserError
from ldm_jax.images import to_float
from ldm_jax.metrics.reconstruction import psnr, ssim
from ldm_jax.training.sharding import make_mesh

RNG = np.random.default_rng(0)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def pairs(count=3, height=14, width=17, channels=3, noise=40):
    """8-bit images of ramps and noise, and noisy copies, as floats."""
    ramp = np.linspace(0, 255, width)[None, None, :, None]
    clean = 0.5 * ramp + RNG.integers(0, 128, (count, height, width, channels))
    noisy = clean + RNG.integers(-noise, noise + 1, clean.shape)
    return [to_float(x.clip(0, 255).astype(np.uint8)) for x in (clean, noisy)]


def ssim_by_loops(a, b):
    """The formula of the paper for (H, W, C), window by window, in float64 grey levels."""
    a, b = (127.5 * (x.astype(np.float64) + 1) for x in (a, b))
    weights = np.zeros((11, 11))
    for i in range(11):
        for j in range(11):
            weights[i, j] = np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for c in range(a.shape[2]):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (z[top : top + 11, left : left + 11, c] for z in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                value = (2 * mx * my + C1) * (2 * cov + C2)
                values.append(value / ((mx**2 + my**2 + C1) * (vx + vy + C2)))
    return np.mean(values)


def test_ssim_is_that_of_the_paper():
    a, b = pairs()
    want = [ssim_by_loops(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.3 < min(want) and max(want) < 0.95  # neither end of the scale
    # float32: windows' variances are differences of means, good to 1e-6 of the range's square.
    np.testing.assert_allclose(ssim(a, b), want, rtol=0, atol=1e-4)


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b = (np.full((1, 12, 12, 3), x, np.float32) for x in (0.5, -0.25))
    x, y = 127.5 * 1.5, 127.5 * 0.75  # grey levels
    want = (2 * x * y + C1) / (x**2 + y**2 + C1)
    np.testing.assert_allclose(ssim(a, b), want, rtol=0, atol=1e-4)


def test_ssim_is_one_for_the_same_and_symmetric_and_falls_with_noise():
    a, b = pairs()
    np.testing.assert_array_equal(ssim(a, a), 1.0)
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), rtol=0, atol=1e-6)
    for axis in (1, 2, 3):  # mirrored, or the channels in another order
        flipped = ssim(np.flip(a, axis), np.flip(b, axis))
        np.testing.assert_allclose(flipped, ssim(a, b), rtol=0, atol=1e-5)
    worse = pairs(noise=120)
    assert (np.asarray(ssim(*worse)) < np.asarray(ssim(a, b)) - 0.1).all()


def test_psnr_by_hand():
    a, b = pairs()
    error = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(4 / error), rtol=0, atol=1e-4)
    # In grey levels the peak is 255: one level everywhere is 20 log10(255) = 48.13 dB.
    level = np.full((1, 4, 4, 3), 2 / 255, np.float32)
    np.testing.assert_allclose(psnr(0 * level, level), 20 * np.log10(255), rtol=0, atol=1e-4)


def test_psnr_of_equal_images_is_the_stated_cap():
    a, _ = pairs()
    np.testing.assert_allclose(psnr(a, a), 100.0, rtol=0, atol=1e-4)


def test_nothing_depends_on_the_other_images_or_the_devices():
    a, b = pairs(count=8)
    split = NamedSharding(make_mesh(), PartitionSpec("data"))
    for metric in (psnr, ssim):
        together = jax.jit(metric, in_shardings=split, out_shardings=split)(a, b)
        alone = [metric(a[i : i + 1], b[i : i + 1])[0] for i in range(8)]
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_nan_shows():
    a, b = pairs()
    b[1, 3, 4, 0] = np.nan
    for metric in (psnr, ssim):
        np.testing.assert_array_equal(np.isnan(metric(a, b)), [False, True, False])


def test_images_that_cannot_be_compared_are_refused():
    a, b = pairs(height=10)
    with pytest.raises(UserError, match="at least 11x11, got 10x17"):
        ssim(a, b)
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match=r"two batches.*\(3, 10, 17, 3\), \(2, 10, 17, 3\)"):
            metric(a, b[:2])
