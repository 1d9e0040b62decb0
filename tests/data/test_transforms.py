import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.transforms import UNIFORMS, CachedTransform, Draw, ImageTransform, crop_resize
from ldm_jax.errors import UserError


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_center_crop_without_resize_is_exact():
    image = noise(8, 13)
    np.testing.assert_array_equal(crop_resize(image, (8, 8), Draw()), image[:, 2:10])
    np.testing.assert_array_equal(
        crop_resize(image, (8, 8), Draw(flip=True)), image[:, 2:10][:, ::-1]
    )
    image = noise(13, 8)
    np.testing.assert_array_equal(crop_resize(image, (8, 8), Draw()), image[2:10])


def test_resize_is_pillows_bicubic_of_the_crop():
    image = noise(40, 61)
    crop = Image.fromarray(image[:, 10:50])
    expected = np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_resize(image, (16, 16), Draw()), expected)


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(crop_resize(stripes, (16, 16), Draw())[:, 2:-2].astype(int) - 128).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 200)])
def test_small_images_are_enlarged(size):
    assert crop_resize(noise(*size), (16, 16), Draw()).shape == (16, 16, 3)


def test_random_crops_have_the_sides_of_the_recipe_and_reach_the_borders():
    transform = ImageTransform(8, crop="random")
    rng = np.random.default_rng(1)
    # A picture of its own row numbers tells where a crop begins and ends.
    rows = np.repeat(np.arange(100, dtype=np.uint8)[:, None, None], 100, 1).repeat(3, 2)
    sides, tops, bottoms = [], [], []
    for _ in range(400):
        draw = transform.draw(rng.random(UNIFORMS))
        side = round(100 * (0.5 + 0.5 * draw.crop[0]))
        crop = crop_resize(rows, (side, side), draw)
        sides.append(side)
        tops.append(crop[0, 0, 0])
        bottoms.append(crop[-1, 0, 0])
        assert crop[-1, 0, 0] - crop[0, 0, 0] == side - 1
    assert min(sides) <= 51 and max(sides) >= 99 and abs(np.mean(sides) - 75) < 2
    assert min(tops) == 0 and max(bottoms) == 99


def test_the_flip_does_not_depend_on_what_is_loaded():
    transforms = [ImageTransform(8), ImageTransform(4, crop="random"), CachedTransform()]
    uniforms = np.random.default_rng(5).random((300, UNIFORMS))
    flips = [[transform.draw(row).flip for row in uniforms] for transform in transforms]
    assert flips[0] == flips[1] == flips[2]
    assert 110 < sum(flips[0]) < 190


def test_no_flip():
    for transform in (ImageTransform(8, flip=False), CachedTransform(flip=False)):
        assert not any(transform.draw(np.full(UNIFORMS, i / 50)).flip for i in range(50))


def test_cached_picks_plain_or_mirrored():
    example = {"moments": np.stack([np.zeros((2, 2, 6)), np.ones((2, 2, 6))])}
    for flip in (False, True):
        picked = CachedTransform().apply(example, Draw(flip=flip))["moments"]
        np.testing.assert_array_equal(picked, np.full((2, 2, 6), float(flip)))


def test_bad_settings():
    with pytest.raises(UserError, match="at least 1, not 0"):
        ImageTransform(0)
    with pytest.raises(UserError, match="center, random"):
        ImageTransform(8, crop="middle")
