"""Agreement of images with conditions, on known answers."""

import numpy as np
import pytest

from ldm_jax.metrics import consistency as measure


def test_a_derangement_moves_every_row_once():
    for count in (2, 3, 50):
        other = measure.derangement(count)
        assert sorted(other) == list(range(count))
        assert not np.any(other == np.arange(count))
    assert np.array_equal(measure.derangement(50), measure.derangement(50))
    assert not np.array_equal(measure.derangement(50), measure.derangement(50, seed=1))


@pytest.mark.parametrize(
    ("other", "iou"),
    [
        ((0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.25, 0.0, 0.75, 0.5), 1 / 3),
        ((0.25, 0.25, 0.75, 0.75), 1 / 7),
        ((0.5, 0.5, 1.0, 1.0), 0.0),
        ((0.1, 0.1, 0.1, 0.1), 0.0),
    ],
)
def test_overlap_of_boxes(other, iou):
    box = (0.0, 0.0, 0.5, 0.5)
    assert measure.box_iou(box, other) == pytest.approx(iou)
    assert measure.box_iou(other, box) == pytest.approx(iou)


def test_extent_is_that_of_what_is_near_and_no_speck():
    mask = np.zeros((20, 40), bool)
    mask[4:12, 10:20] = True
    want = (10 / 40, 4 / 20, 20 / 40, 12 / 20)
    box = (0.25, 0.25, 0.5, 0.6)
    assert measure.extent_near(mask, box) == want
    mask[14, 22] = True  # near, but a speck
    mask[4:12, 32:40] = True  # as large, but far
    assert measure.extent_near(mask, box) == want
    mask[12:14, 12:20] = True  # a part that is none
    assert measure.extent_near(mask, box) == (*want[:3], 14 / 20)
    nothing = measure.extent_near(np.zeros((20, 40), bool), box)
    assert measure.box_iou(nothing, box) == 0


def test_what_differs_from_the_ground():
    image = np.full((16, 16, 3), 100, np.uint8)
    image[2:6, 2:10] = (100, 100, 200)
    image[12, 12] = 110  # noise
    found = measure.differs_from_ground(image, [(2 / 16, 2 / 16, 10 / 16, 6 / 16)])
    want = np.zeros((16, 16), bool)
    want[2:6, 2:10] = True
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(
        measure.inside([(2 / 16, 2 / 16, 10 / 16, 6 / 16)], (16, 16)), want
    )


def test_retrieval_of_right_and_of_shuffled_captions():
    count = 200
    texts, own = [str(i) for i in range(count)], np.arange(count)
    right = np.eye(count)
    assert measure.retrieval(right, right, texts, own, 50) == 1
    # Scores that know nothing of the pairs: one in fifty, 200 tries with a deviation of 0.01.
    blind = np.random.RandomState(0).standard_normal((count, count))
    assert measure.retrieval(blind, right, texts, own, 50) == pytest.approx(1 / 50, abs=0.03)
    assert measure.retrieval(right, right, texts, measure.derangement(count), 50) == 0


def test_a_caption_of_the_same_words_is_no_wrong_answer():
    images = captions = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    own = np.arange(3)
    assert measure.retrieval(images, captions, ["a cat", "a cat", "a bus"], own, 3) == 1
    # A tie of different captions is no answer: an encoder that sees nothing gets 0.
    assert measure.retrieval(images, captions, ["a cat", "a dog", "a bus"], own, 3) == 1 / 3


def test_agreement_of_maps():
    maps = np.array([[[0, 0, 0, 1], [0, 0, 2, 2]]])
    found = np.array([[[0, 0, 0, 1], [0, 1, 2, 1]]])
    assert measure.agreement(found, maps, ground=0) == (6 / 8, 2 / 3)
    assert measure.agreement(found, maps, ground=2) == (6 / 8, 5 / 6)
    assert np.isnan(measure.agreement(maps, np.zeros_like(maps), ground=0)[1])
    everywhere, objects = measure.agreement(found, maps)  # nothing says which class is the ground
    assert everywhere == 6 / 8 and np.isnan(objects)


def test_colourfulness_of_known_colours():
    def flat(*colours):
        return np.array(colours, np.uint8).reshape(1, 1, -1, 3)

    assert measure.colourfulness(flat((90, 90, 90), (10, 10, 10)))[0] == 0
    # Of one colour only the mean counts: rg = 200, yb = 100.
    assert measure.colourfulness(flat((200, 0, 0)))[0] == pytest.approx(0.3 * np.hypot(200, 100))
    # Red and cyan: rg = +-200, yb = +-100, both of mean 0.
    found = measure.colourfulness(flat((200, 0, 0), (0, 200, 200)))[0]
    assert found == pytest.approx(np.hypot(200, 100))


def test_luma_of_colours():
    image = np.array([[[[255, 0, 0], [0, 0, 255]]]], np.uint8)
    grey = measure.grey_levels(image)
    np.testing.assert_array_equal(grey, [[[76, 29]]])  # 0.299 and 0.114 of 255
    assert measure.luma_error(image, grey)[0] < 0.5
    assert measure.luma_error(image, grey + np.uint8(10))[0] == pytest.approx(10, abs=0.5)


def test_distance_to_strokes_ignores_what_is_within_squares():
    strokes = np.full((1, 16, 16, 3), 100, np.uint8)
    fine = strokes.copy()
    fine[:, ::2] -= 20
    fine[:, 1::2] += 20
    assert measure.stroke_distance(fine, strokes)[0] == 0
    half = strokes.copy()
    half[:, :8] += 10
    assert measure.stroke_distance(half, strokes)[0] == pytest.approx(10 / np.sqrt(2))


def test_changes_outside_a_hole_and_its_fill():
    image = np.full((1, 8, 8, 3), 50, np.uint8)
    image[:, 4:] = 150
    hole = np.zeros((1, 8, 8), bool)
    hole[:, 2:6, 2:6] = True
    fill = measure.mean_colour_fill(image, hole)
    assert measure.largest_change(fill, image, hole) == 0
    np.testing.assert_array_equal(fill[0, 2:6, 2:6], 100)
    fill[0, 0, 0, 0] += 3
    assert measure.largest_change(fill, image, hole) == 3
    assert measure.largest_change(image, fill, hole) == 3  # not of unsigned numbers


def test_clip_score():
    images = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    captions = np.array([[3.0, 0.0], [5.0, 0.0], [-1.0, 0.5]])
    found = measure.clip_score(images, captions)
    np.testing.assert_allclose(found, [100, 100 / np.sqrt(2), 0], rtol=1e-12)
