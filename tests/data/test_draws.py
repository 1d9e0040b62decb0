import numpy as np

from ldm_jax.data.draws import Uniforms
from ldm_jax.data.order import uniforms_at

KNOWN = [0.1878535465631057, 0.7798290954333348, 11]
KNOWN_ORDER = [4, 0, 2, 1, 3]
KNOWN_NORMAL = [0.6811438202857971, -0.44559910893440247, -0.7041558623313904]


def test_numbers_follow_from_seed_stream_and_position():
    first = [Uniforms(0, 1, 2)() for _ in range(3)]
    assert len(set(first)) == 1
    places = [
        (seed, stream, position) for seed in (0, 1) for stream in (0, 1) for position in (0, 1)
    ]
    numbers = [x for place in places for x in Uniforms(*place).array(100)]
    assert len(set(numbers)) == len(numbers) and 0 <= min(numbers) and max(numbers) < 1
    assert not set(numbers) & set(uniforms_at(0, 0, 200, 4).reshape(-1))


def test_known_values():
    """A run that is resumed after an upgrade must find the same masks."""
    random = Uniforms(3, 1, 5)
    assert [random(), random(), random.integer(1, 100)] == KNOWN
    np.testing.assert_array_equal(random.permutation(5), KNOWN_ORDER)
    np.testing.assert_allclose(random.normal(3), KNOWN_NORMAL, rtol=1e-6)


def test_one_by_one_or_at_once_are_the_same_numbers():
    one, many = Uniforms(7), Uniforms(7)
    np.testing.assert_array_equal([[one(), one()], [one(), one()]], many.array((2, 2)))


def test_whole_numbers_and_choices_are_fair_and_reach_both_ends():
    random = Uniforms(1)
    counts = np.bincount([random.integer(3, 6) for _ in range(4000)], minlength=8)
    assert counts[:3].sum() == counts[7:].sum() == 0
    assert np.abs(counts[3:7] - 1000).max() < 120  # 4.4 standard deviations
    chosen = [random.choice("abc") for _ in range(3000)]
    assert all(abs(chosen.count(letter) - 1000) < 115 for letter in "abc")
    orders = [tuple(random.permutation(3)) for _ in range(1200)]
    assert len(set(orders)) == 6 and all(abs(orders.count(o) - 200) < 57 for o in set(orders))


def test_between():
    numbers = [Uniforms(2, 0, i).between(-1, 3) for i in range(2000)]
    assert -1 <= min(numbers) < -0.98 and 2.98 < max(numbers) < 3
    assert abs(np.mean(numbers) - 1) < 0.11  # 4.2 standard deviations


def test_normal_numbers():
    normal = Uniforms(4).normal((101, 99, 3))  # an odd number of them
    assert normal.shape == (101, 99, 3) and normal.dtype == np.float32
    count = normal.size
    # Mean, variance, third and fourth moment, and what is next to each other in the pairs and in
    # the order: each within 4.5 standard deviations of its estimate.
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = np.mean(normal.astype(float) ** moment) - expected
        assert abs(error) < 4.5 * np.sqrt(variance / count), moment
    flat = normal.reshape(-1)
    half = (count + 1) // 2
    for other in (np.roll(flat, 1), np.roll(flat, half)):
        assert abs(np.mean(flat * other)) < 4.5 / np.sqrt(count)
