import functools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm_jax.data.draws import Uniforms
from ldm_jax.data.masks import KINDS, MIN_SIZE, draw_mask
from ldm_jax.errors import UserError

DRAWS = 200
MOST = {"thin": 0.5, "medium": 0.5, "thick": 0.5, "box": 0.9, "mixed": 0.9}


@functools.cache
def draw_many(kind, size):
    return np.stack([draw_mask(Uniforms(0, 0, i), size, kind) for i in range(DRAWS)])


def shares(kind, size):
    return draw_many(kind, size).mean(axis=(1, 2))


def thickness(masks):
    """The part of all holes whose eight neighbours are in the hole, too."""
    left = [
        np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(3))).mean()
        for mask in masks
    ]
    return np.mean(left) / masks.mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [MIN_SIZE, 32, 100, 256])
def test_holes_are_neither_empty_nor_all_of_the_image(kind, size):
    masks = draw_many(kind, size)
    assert masks.shape == (DRAWS, size, size) and masks.dtype == bool
    assert shares(kind, size).min() > 0 and shares(kind, size).max() <= MOST[kind]


def test_holes_at_512_use_their_own_numbers():
    masks = {
        kind: np.stack([draw_mask(Uniforms(0, 0, i), 512, kind) for i in range(60)])
        for kind in KINDS
    }
    for kind in KINDS:
        assert 0 < masks[kind].mean(axis=(1, 2)).min(), kind
        assert masks[kind].mean(axis=(1, 2)).max() <= MOST[kind], kind
    # Training masks only grow; the strokes of 'thin' are longer and thinner for their size.
    half = masks["box"][:, ::2, ::2]
    assert (half != draw_many("box", 256)[:60]).mean() < 0.01
    assert (masks["thin"][:, ::2, ::2] != draw_many("thin", 256)[:60]).mean() > 0.1


def test_a_mask_is_a_function_of_its_numbers():
    for kind in KINDS:
        again = draw_mask(Uniforms(0, 0, 3), 32, kind)
        np.testing.assert_array_equal(again, draw_many(kind, 32)[3])
        assert len({mask.tobytes() for mask in draw_many(kind, 32)}) > 0.9 * DRAWS


def test_thin_medium_and_thick_are_what_they_say():
    """In the width of their holes: by area, LaMa's three are much alike."""
    values = [thickness(draw_many(kind, 64)) for kind in ("thin", "medium", "thick")]
    assert values[0] < 0.25 and values[1] > values[0] + 0.3 and values[2] > values[1] + 0.1, values


@pytest.mark.parametrize("kind", KINDS)
def test_the_area_share_hardly_depends_on_the_size(kind):
    assert abs(shares(kind, 32).mean() - shares(kind, 256).mean()) < 0.06
    assert 0.15 < shares(kind, 256).mean() < 0.4


def test_holes_are_everywhere():
    for kind in ("thin", "medium", "thick", "mixed"):
        where = draw_many(kind, 32).mean(axis=0)
        assert where.min() > 0.05 and where.max() < 0.7, kind
    inner = draw_many("box", 256)[:, 10:-10, 10:-10]
    assert draw_many("box", 256).sum() == inner.sum()
    assert inner.any(axis=0).mean() > 0.99


def test_boxes_have_the_sides_of_the_recipe():
    ones = [mask for mask in draw_many("box", 256) if is_a_box(mask)]
    sides = np.array([(mask.any(axis=1).sum(), mask.any(axis=0).sum()) for mask in ones])
    assert len(ones) > DRAWS / 4  # one box in four masks, and some that hide others
    assert sides.min() >= 30 and sides.min() < 45
    assert sides.max() <= 150 and sides.max() > 135
    assert (sides[:, 0] > sides[:, 1]).mean() == pytest.approx(0.5, abs=0.25)


def is_a_box(mask):
    return mask.sum() == mask.any(axis=1).sum() * mask.any(axis=0).sum()


def test_half_of_the_mixed_masks_are_boxes():
    border = np.ones((256, 256), bool)
    border[10:-10, 10:-10] = False
    masks = draw_many("mixed", 256)
    boxes = ~(masks & border).any(axis=(1, 2))  # strokes of this width nearly always touch it
    assert 0.4 < boxes.mean() < 0.65
    known = {mask.tobytes() for mask in draw_many("thick", 256)}
    assert any(mask.tobytes() in known for mask in masks[~boxes])  # the same strokes


def test_bad_settings():
    with pytest.raises(UserError, match="'round'; choose one of: thin, medium, thick, box, mixed"):
        draw_mask(Uniforms(0), 32, "round")
    with pytest.raises(UserError, match="at least 16 pixels, not 15"):
        draw_mask(Uniforms(0), 15)
