import numpy as np
import pytest

from ldm_jax.data.degradation import KINDS, bicubic_down, bsr_down, degrade, jpeg, random_noise
from ldm_jax.data.draws import Uniforms
from ldm_jax.errors import UserError


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def ramp(size):
    """Levels that rise to the right, in a colour that JPEG keeps."""
    levels = np.broadcast_to(np.arange(size) * 2 + 20, (size, size))
    return np.repeat(levels[..., None], 3, axis=-1).astype(np.uint8)


def spot(size, row, column):
    rows, columns = np.mgrid[:size, :size] + 0.5
    squares = (rows - row) ** 2 + (columns - column) ** 2
    levels = 255 * np.exp(-0.5 * squares / (size / 10) ** 2)
    return np.repeat(np.rint(levels)[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_bicubic_of_a_constant_and_of_a_ramp(factor):
    constant = np.full((24, 48, 3), (0, 100, 255), np.uint8)
    expected = np.full((24 // factor, 48 // factor, 3), (0, 100, 255), np.uint8)
    np.testing.assert_array_equal(bicubic_down(constant, factor), expected)
    means = ramp(96).reshape(96, 96 // factor, factor, 3).mean(axis=2)[::factor]
    small = bicubic_down(ramp(96), factor)
    assert np.abs(small - means)[:, 2:-2].max() <= 0.5  # all of it rounding


def test_bicubic_is_antialiased():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(bicubic_down(stripes, 4)[:, 1:-1].astype(int) - 128).max() <= 6


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 32), (128, 192)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_result_has_the_size(size, factor):
    image = noise(*size)
    for position in range(6):
        small = bsr_down(image, factor, Uniforms(0, 0, position))
        assert small.shape == (size[0] // factor, size[1] // factor, 3)
        assert small.dtype == np.uint8
    np.testing.assert_array_equal(image, noise(*size))


def test_the_result_is_a_function_of_the_random_numbers():
    image = ramp(64)
    image.flags.writeable = False
    results = [bsr_down(image, 4, Uniforms(1, 0, i)) for i in range(20)]
    np.testing.assert_array_equal(bsr_down(image, 4, Uniforms(1, 0, 3)), results[3])
    assert len({result.tobytes() for result in results}) == 20


def test_kinds():
    image = noise(16, 16)
    for kind, down in (("bicubic", lambda: bicubic_down(image, 2)), ("bsr", lambda: bsr(image, 2))):
        np.testing.assert_array_equal(degrade(image, 2, kind, Uniforms(5)), down())
    assert KINDS == ("bicubic", "bsr")
    with pytest.raises(UserError, match="'blur'; choose one of: bicubic, bsr"):
        degrade(image, 2, "blur", Uniforms(5))


def bsr(image, factor):
    return bsr_down(image, factor, Uniforms(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [3, 0, -2, 32])
def test_the_factor_must_divide_the_sides(kind, factor):
    with pytest.raises(UserError, match=f"16x32 cannot be reduced {factor} times"):
        degrade(noise(16, 32), factor, kind, Uniforms(0))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_flat_colours_keep_their_mean_and_get_mild_noise(factor):
    image = np.full((64, 64, 3), 120, np.uint8)  # JPEG rounds colours, but no grey
    errors = [bsr_down(image, factor, Uniforms(0, 0, i)).astype(int) - 120 for i in range(40)]
    means = np.stack([error.mean(axis=(0, 1)) for error in errors])
    assert np.abs(means.mean(axis=0)).max() < 0.2
    assert np.abs(means).max() < 2.5
    assert 0.3 < np.mean([error.std(axis=(0, 1)).mean() for error in errors]) < 2


@pytest.mark.parametrize("factor", [2, 4])
def test_pictures_stay_in_place(factor):
    """Or a model learns to move what it enlarges."""
    size = 64
    image = spot(size, 24, 40)
    offsets = []
    for position in range(60):
        small = bsr_down(image, factor, Uniforms(2, 0, position)).mean(axis=-1)
        small = np.maximum(small - 12, 0)  # not the noise of the background
        places = (np.arange(size // factor) + 0.5) * factor
        row, column = (small.sum(axis=axis) @ places / small.sum() for axis in (1, 0))
        offsets.append((row - 24, column - 40))
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.03 * factor


def test_pictures_stay_recognizable_and_lose_detail():
    smooth, detailed = spot(128, 50, 70), noise(128, 128)[..., :1].repeat(3, axis=-1)
    kept, lost = [], []
    for position in range(40):
        random = Uniforms(3, 0, position)
        small = bsr_down(smooth, 4, random)
        kept.append(np.corrcoef(small.reshape(-1), bicubic_down(smooth, 4).reshape(-1))[0, 1])
        lost.append(bsr_down(detailed, 4, random).std())
    assert np.median(kept) > 0.98 and min(kept) > 0.9
    # The noise has a deviation of 74, which means over 4x4 pixels bring to 18.
    assert min(lost) < 6 and max(lost) > 30


def test_noise_is_of_the_stated_kinds_and_strengths():
    size = (40, 40)
    kinds = {"grey": [], "colour": [], "correlated": []}
    for position in range(150):
        added = random_noise(size, Uniforms(0, 0, position))
        assert added.dtype == np.float32 and added.shape in ((1, *size), (3, *size))
        deviation = added.std(axis=(1, 2))
        assert np.abs(added.mean(axis=(1, 2))).max() < 0.3  # 6 standard deviations of the mean
        if len(added) == 1:
            kinds["grey"].append(deviation)
            continue
        correlation = np.corrcoef(added.reshape(3, -1))[np.triu_indices(3, 1)]
        # 4 standard deviations of the estimates.
        independent = np.abs(correlation).max() < 0.1 and off_level(deviation) < 0.14
        kinds["colour" if independent else "correlated"].append(deviation)
    for kind, expected in (("grey", 0.4), ("colour", 0.4), ("correlated", 0.2)):
        assert len(kinds[kind]) / 150 == pytest.approx(expected, abs=0.13), kind
    for kind in ("grey", "colour"):
        levels = np.concatenate(kinds[kind])
        assert off_level(levels) < 0.14
        assert set(np.rint(levels)) == {1, 2}
    assert np.max(kinds["correlated"]) < 2.15


def off_level(deviations):
    return np.abs(deviations - np.rint(deviations)).max()


def test_jpeg():
    smooth = spot(64, 30, 30)
    assert np.abs(jpeg(smooth, 100).astype(int) - smooth).max() <= 2
    errors = [
        np.abs(jpeg(noise(64, 64), q).astype(int) - noise(64, 64)).mean() for q in (30, 80, 95)
    ]
    assert errors[0] > errors[1] > errors[2]
