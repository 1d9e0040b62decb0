import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from ldm_jax.data import filters

# Sums of float32 levels up to 255 are off by about 1e-4.
TOLERANCE = dict(rtol=0, atol=1e-3)


def noise(height, width):
    return np.random.default_rng(0).uniform(0, 255, (3, height, width)).astype(np.float32)


def ramp(height, width):
    rows, columns = np.mgrid[:height, :width]
    return (2 * rows + 5 * columns)[None].astype(np.float32)


def covariance(first, second, angle):
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return axes @ np.diag([first, second]) @ axes.T


@pytest.mark.parametrize("kind", filters.RESIZES)
def test_resizing_to_the_same_size_changes_nothing(kind):
    image = noise(9, 14)
    np.testing.assert_array_equal(filters.resize(image, (9, 14), kind), image)


@pytest.mark.parametrize("kind", filters.RESIZES)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (9, 14), (31, 40), (200, 2)])
def test_resizing_keeps_a_constant(kind, size):
    resized = filters.resize(np.full((3, 9, 14), 200, np.float32), size, kind)
    assert resized.shape == (3, *size) and resized.dtype == np.float32
    np.testing.assert_allclose(resized, 200, **TOLERANCE)


def test_linear_is_pillows_where_it_enlarges():
    image = noise(9, 14)[0]
    expected = Image.fromarray(image).resize((37, 20), Image.Resampling.BILINEAR)
    resized = filters.resize(image[None], (20, 37), "linear")[0]
    np.testing.assert_allclose(resized, expected, rtol=0, atol=2e-3)


def test_linear_and_cubic_are_not_antialiased():
    stripes = np.zeros((1, 8, 64), np.float32)
    stripes[..., ::4] = 96  # a place between two pixels sees 0, or part of 96
    linear = filters.resize(stripes, (8, 16), "linear")
    np.testing.assert_array_equal(linear[0, :, 1:-1], 0)
    # Half way between pixels the cubic of -0.75 has the weights -3, 19, 19 and -3, of 32.
    cubic = filters.resize(stripes, (8, 16), "cubic")
    np.testing.assert_allclose(cubic[0, :, 1:-1], -9, **TOLERANCE)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_interpolation_keeps_a_ramp(kind):
    resized = filters.resize(ramp(16, 24), (8, 6), kind)
    rows, columns = np.mgrid[:8, :6]
    expected = 2 * (2 * rows + 0.5) + 5 * (4 * columns + 1.5)
    np.testing.assert_allclose(resized[0, 1:-1, 1:-1], expected[1:-1, 1:-1], **TOLERANCE)


def test_area_takes_means():
    image = noise(12, 20)
    means = image.reshape(3, 4, 3, 5, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(filters.resize(image, (4, 5), "area"), means, **TOLERANCE)
    for size in ((7, 9), (12, 20), (30, 33)):  # every pixel counts as much, whatever the size
        mean = filters.resize(image, size, "area").mean(axis=(1, 2))
        np.testing.assert_allclose(mean, image.mean(axis=(1, 2)), **TOLERANCE)


@pytest.mark.parametrize("size", [5, 7, 13])
def test_kernels_have_the_sum_and_the_covariance(size):
    kernel = filters.gaussian_kernel(size, covariance(0.9, 0.4, 0.6))
    assert kernel.shape == (size, size) and kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    place = np.arange(size) - size // 2
    moments = [
        [(kernel * place**2).sum(), (kernel * place * place[:, None]).sum()],
        [(kernel * place * place[:, None]).sum(), (kernel * place[:, None] ** 2).sum()],
    ]
    cut = 0.06 if size < 7 else 3e-3  # the Gaussian is cut off: at 5 pixels after 2.6 sigma
    np.testing.assert_allclose(moments, covariance(0.9, 0.4, 0.6), rtol=0, atol=cut)


def test_the_narrowest_blur_changes_nothing():
    image = noise(20, 33)
    kernel = filters.gaussian_kernel(5, np.diag([1e-4, 1e-4]))
    np.testing.assert_array_equal(filters.convolve(image, kernel), image)
    taps = [filters.gaussian_taps(length, 5, 1e-2) for length in (20, 33)]
    np.testing.assert_array_equal(filters.filter_planes(image, *taps), image)


@pytest.mark.parametrize("size", [5, 13])
def test_convolution_is_scipys(size):
    image = noise(20, 33)
    kernel = filters.gaussian_kernel(size, covariance(2.0, 0.3, 0.7))
    expected = scipy.ndimage.convolve(
        image.astype(float), kernel[None].astype(float), mode="mirror"
    )
    np.testing.assert_allclose(filters.convolve(image, kernel), expected, **TOLERANCE)


@pytest.mark.parametrize("size", [5, 25])
@pytest.mark.parametrize("shape", [(20, 33), (3, 2), (1, 9)])  # some smaller than the kernel
def test_separate_axes_give_the_isotropic_kernel(size, shape):
    image = noise(*shape)
    taps = [filters.gaussian_taps(length, size, 0.8) for length in shape]
    expected = filters.convolve(image, filters.gaussian_kernel(size, np.diag([0.64, 0.64])))
    # The kernel lacks what is less than 1e-5 of its middle.
    np.testing.assert_allclose(filters.filter_planes(image, *taps), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("sigma", [0.1, 1.5])
def test_a_shifted_blur_is_centred_on_the_pixels_that_one_stands_for(factor, sigma):
    size = 16 * factor
    taps = filters.gaussian_taps(size, 25, sigma, (factor - 1) / 2, factor)
    reduced = filters.filter_planes(ramp(size, size), taps, taps)
    rows, columns = np.mgrid[:16, :16] * factor + (factor - 1) / 2
    inside = slice(16 // factor, -(16 // factor) - 1)  # away from the mirrored ends
    expected = (2 * rows + 5 * columns)[inside, inside]
    np.testing.assert_allclose(reduced[0, inside, inside], expected, **TOLERANCE)
