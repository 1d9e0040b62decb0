import numpy as np
import pytest

from ldm_jax.data.layout import (
    box_picture,
    boxes_from_coco,
    clip_boxes,
    decode_layout,
    encode_layout,
    slots,
)
from ldm_jax.errors import UserError

NAMES = ("cat", "dog", "tree")


def test_tokens_of_the_released_model_by_hand():
    # 8192 tokens: a grid of 90 x 90. Corners at (0, 0), (0.5, 0.25) -> round(44.5) = 44 (half to
    # even), round(22.25) = 22 -> 22 * 90 + 44 = 2024; (1, 1) -> 89 * 90 + 89 = 8099.
    tokens = encode_layout([(3, 0, 0, 0.5, 0.25), (600, 0.5, 0.25, 1, 1)], 92, 8192)
    assert tokens.dtype == np.int32 and tokens.shape == (92,)
    assert tokens[:6].tolist() == [3, 0, 2024, 600, 2024, 8099]
    assert set(tokens[6:90].tolist()) == {8191}
    assert tokens[90:].tolist() == [0, 8099]


def test_tokens_of_a_small_model_by_hand():
    # 512 tokens: 22 x 22. (1/3, 2/3) -> column 7, row 14 -> 14 * 22 + 7 = 315; last corner 483.
    tokens = encode_layout([(5, 1 / 3, 2 / 3, 1, 1)], 20, 512)
    assert tokens.tolist() == [5, 315, 483] + [511] * 15 + [0, 483]
    # 16 tokens: 4 x 4, and the two corners that the original's docstring draws: 6 and 15.
    assert encode_layout([(1, 2 / 3, 1 / 3, 1, 1)], 3, 16).tolist() == [1, 6, 15]


def test_no_boxes_are_padding_and_the_crop():
    assert encode_layout([], 5, 512).tolist() == [511, 511, 511, 0, 483]
    assert encode_layout([], 6, 512).tolist() == [511] * 6
    assert decode_layout(encode_layout([], 92, 8192), 8192) == []


@pytest.mark.parametrize(("vocab_size", "length"), [(8192, 92), (512, 20), (64, 12), (64, 14)])
def test_round_trip_is_exact_to_half_a_step(vocab_size, length):
    rng = np.random.default_rng(0)
    step = 1 / (int(vocab_size**0.5) - 1)
    for count in range(slots(length) + 1):
        corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4)
        classes = rng.integers(0, vocab_size - 1, count)
        boxes = [
            (int(label), *edges.tolist()) for label, edges in zip(classes, corners, strict=True)
        ]
        back = decode_layout(encode_layout(boxes, length, vocab_size), vocab_size)
        assert [box[0] for box in back] == classes.tolist()
        # 1e-12: the bound itself is reached up to float64 rounding
        if count:
            assert np.abs(np.array(back)[:, 1:] - corners).max() <= step / 2 + 1e-12


def test_a_corner_with_the_number_of_the_padding_is_no_padding():
    tokens = encode_layout([(2, 0, 0, 1, 1)], 6, 64)
    assert tokens.tolist() == [2, 0, 63, 63, 63, 63]
    assert decode_layout(tokens, 64) == [(2, 0, 0, 1, 1)]


def test_boxes_that_reach_over_the_image_are_clipped():
    over = encode_layout([(1, -0.5, 0.5, 1.5, 2)], 5, 512)
    np.testing.assert_array_equal(over, encode_layout([(1, 0, 0.5, 1, 1)], 5, 512))
    assert clip_boxes([(1, -0.5, 0.5, 1.5, 2)]) == [(1, 0, 0.5, 1, 1)]


def test_boxes_from_coco():
    entries = [{"label": 4, "bbox": [16, 8, 32, 24]}, {"label": 0, "bbox": (-1, 0, 65, 32)}]
    expected = [(4, 0.25, 0.25, 0.75, 1), (0, -1 / 64, 0, 1, 1)]
    assert boxes_from_coco(entries, 64, 32) == expected
    assert boxes_from_coco([{"label": 1, "bbox": [0, 0.5, 1, 0.5]}]) == [(1, 0, 0.5, 1, 1)]


def test_order_places_the_boxes():
    boxes = [(i, 0.1 * i, 0, 1, 1) for i in range(3)]
    given = encode_layout(boxes, 11, 512)
    turned = encode_layout(boxes, 11, 512, order=np.array([2, 0, 1]))
    assert given[:9:3].tolist() == [0, 1, 2]
    assert turned[:9:3].tolist() == [2, 0, 1]
    np.testing.assert_array_equal(turned[:3], given[6:9])
    np.testing.assert_array_equal(turned, encode_layout(boxes, 11, 512, order=[2, 0, 1]))


def test_of_too_many_boxes_the_largest_are_kept_in_order():
    boxes = [(0, 0, 0, 0.5, 0.5), (1, 0, 0, 0.2, 0.2), (2, 0, 0, 1, 1), (3, 0, 0, 0.5, 0.5)]
    assert encode_layout(boxes, 6, 512)[::3].tolist() == [0, 2]  # of the equal ones, the first
    assert encode_layout(boxes, 6, 512, order=[3, 2, 1, 0])[::3].tolist() == [2, 0]
    # A large box that hardly reaches into the image, or into the crop, counts as small.
    boxes = [(0, -9, -9, 0.01, 0.01), (1, 0, 0, 0.2, 0.2)]
    assert encode_layout(boxes, 3, 512)[0] == 1
    boxes = [(0, 0, 0, 0.51, 1), (1, 0.6, 0.6, 0.9, 0.9)]
    assert encode_layout(boxes, 3, 512, crop=(0.5, 0.5, 1, 1))[0] == 1


def test_a_crop_is_two_tokens_and_hides_what_is_outside():
    boxes = [(0, 0, 0, 0.25, 1), (1, 0.5, 0, 1, 0.5)]
    tokens = encode_layout(boxes, 8, 8192, crop=(0.25, 0, 0.75, 1))
    # 0.25 * 89 = 22.25 -> 22; 0.75 * 89 = 66.75 -> 67, in row 89: 89 * 90 + 67 = 8077
    assert tokens.tolist() == [1, 44, 44 * 90 + 89, 8191, 8191, 8191, 22, 8077]


def test_without_room_for_a_crop_boxes_are_relative_to_it():
    boxes = [(0, 0, 0, 0.25, 1), (1, 0, 0, 0.3, 0.5)]
    tokens = encode_layout(boxes, 6, 8192, crop=(0.25, 0, 0.75, 1))
    # x 0..0.3 of the image is -0.5..0.1 of the crop, clipped to 0..0.1 (8.9 steps); y stays
    assert tokens.tolist() == [1, 0, 44 * 90 + 9, 8191, 8191, 8191]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0.5, 0.5, 0.5, 0.9), "box 1 .* has no area"),
        ((0, 0.5, 0.9, 0.7, 0.2), "box 1 .* has no area"),
        ((0, 1.0, 0.0, 1.5, 1.0), r"box 1 \(left 1, top 0, right 1.5, bottom 1\) is outside"),
        ((0, 0.0, -0.5, 1.0, 0.0), "box 1 .* is outside"),
        ((0, 0.0, 0.0, float("nan"), 1.0), "box 1 .* no number"),
        ((511, 0, 0, 1, 1), "box 1 has the class 511: choose from 0 to 510"),
        ((-1, 0, 0, 1, 1), "box 1 has the class -1"),
    ],
)
def test_bad_boxes_are_named(box, message):
    with pytest.raises(UserError, match=message):
        encode_layout([(0, 0, 0, 1, 1), box], 20, 512)


def test_bad_settings_are_refused():
    boxes = [(0, 0, 0, 1, 1)]
    for length in (0, 2, 4, 91):
        with pytest.raises(UserError, match=f"layout.length is {length}"):
            encode_layout(boxes, length, 512)
    with pytest.raises(UserError, match=r"layout\.vocab_size is 3"):
        encode_layout(boxes, 6, 3)
    for order in ([1], [0, 0], []):
        with pytest.raises(UserError, match="permutation"):
            encode_layout(boxes, 6, 512, order=order)
    with pytest.raises(UserError, match=r"tokens 3 to 5 \(0, 8150, 3\)"):
        decode_layout(np.array([8191, 0, 0, 0, 8150, 3]), 8192)
    with pytest.raises(UserError, match="length is 7"):
        decode_layout(np.zeros(7, np.int32), 8192)


def test_picture_shows_the_boxes_and_their_names():
    boxes = [(0, 0.1, 0.2, 0.6, 0.9), (2, 0.5, 0.5, 1, 1)]
    picture = box_picture(boxes, NAMES, (192, 256))
    assert picture.dtype == np.uint8 and picture.shape == (192, 256, 3)
    np.testing.assert_array_equal(picture, box_picture(boxes, NAMES, (192, 256)))
    frame = (0, 114, 178)
    assert tuple(picture[100, round(0.1 * 255)]) == frame  # the left and bottom edges of the first
    assert tuple(picture[round(0.9 * 191), 60]) == frame
    assert tuple(picture[100, 60]) == (255, 255, 255)  # inside it
    renamed = box_picture(boxes, ("cow", "dog", "tree"), (192, 256))
    rows, columns = np.nonzero((picture != renamed).any(-1))
    assert len(rows) and rows.max() < 0.35 * 192 and columns.max() < 0.4 * 256  # only its name


def test_small_boxes_lie_above_large_ones():
    picture = box_picture([(0, 0.5, 0.5, 1, 1), (1, 0, 0, 1, 1)], NAMES, (256, 256))
    assert tuple(picture[255, 192]) == (0, 114, 178)  # where both have an edge, the first's colour
    assert tuple(picture[255, 64]) == (213, 94, 0)


def test_picture_without_names_or_area():
    boxes = [(7, 0.5, 0.5, 0.5, 0.5), (9, 0, 0, 1, 1)]
    by_number = box_picture(boxes, None, (64, 64))
    np.testing.assert_array_equal(by_number, box_picture(boxes, NAMES, (64, 64)))
    assert (box_picture([], NAMES, (8, 9)) == 255).all()
