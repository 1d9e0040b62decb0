"""Steps made again from noisier latents: their order, their coefficients and what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import random
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.parameterization import to_prediction
from ldm_jax.diffusion.resampling import visit_order
from ldm_jax.diffusion.samplers import SAMPLERS, Known, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import UserError

SCHEDULE = make_schedule("linear", (1e-4, 0.02), 1000)


def test_the_order_of_the_paper_for_jumps_of_one_step():
    steps, back = visit_order(4, 3, 1)
    # Algorithm 1: every step three times, but the last, whose result is clean, once.
    np.testing.assert_array_equal(steps, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(back, [1, 1, 0, 1, 1, 0, 1, 1, 0, 0])


def test_longer_jumps_go_back_from_places_counted_from_the_end():
    steps, back = visit_order(6, 2, 2)  # back from the levels 5 and 3; 1 is too near the start
    np.testing.assert_array_equal(steps, [0, 1, 2, 1, 2, 3, 4, 3, 4, 5])
    np.testing.assert_array_equal(back, [0, 0, 2, 0, 0, 0, 2, 0, 0, 0])
    np.testing.assert_array_equal(np.diff(steps)[back[:-1] == 0], 1)
    for alone in (visit_order(6, 1, 2), visit_order(6, 1, 1)):
        np.testing.assert_array_equal(alone[0], np.arange(6))
        assert not alone[1].any()


@pytest.mark.parametrize("length", [1, 3])
def test_going_back_is_the_forward_process_between_the_two_levels(length):
    plain = make_table("ddpm", SCHEDULE, 10, spacing="trailing").rows
    rows = make_table("ddpm", SCHEDULE, 10, spacing="trailing", resampling=(2, length)).rows
    for i in np.flatnonzero(rows["renoise"]):
        here, there = (
            next(j for j, t in enumerate(plain["t"]) if t == rows["t"][k]) for k in (i, i + 1)
        )
        reached = here + 1  # the level after the step, which is that of the next row
        assert there == reached - length
        # x_reached = alpha x0 + sigma e becomes alpha' x0 + sigma' e': in float32, to 1e-5.
        alpha, sigma = rows["forward"][i] * plain["alpha"][reached], plain["sigma"][reached]
        np.testing.assert_allclose(alpha, plain["alpha"][there], rtol=1e-5)
        variance = (rows["forward"][i] * sigma) ** 2 + rows["renoise"][i] ** 2
        np.testing.assert_allclose(variance, plain["sigma"][there] ** 2, rtol=1e-5)
    assert (rows["renoise"] > 0).sum() == (9 if length == 1 else 3)
    np.testing.assert_array_equal(rows["forward"][rows["renoise"] == 0], 1)
    np.testing.assert_array_equal(rows["x0"], plain["x0"][np.searchsorted(-plain["t"], -rows["t"])])


CORRELATION, SEEN = 0.9, 1.5  # of the two coordinates, of unit variance; the value of the first


def gaussian(x_t, level):
    """The optimal denoiser of a correlated Gaussian in two dimensions."""
    covariance = jnp.array([[1, CORRELATION], [CORRELATION, 1]])
    mixed = level.alpha**2 * covariance + level.sigma**2 * jnp.eye(2)
    x0 = level.alpha * jnp.linalg.solve(mixed, x_t.T).T @ covariance
    return to_prediction(x0, x_t, level, "x0")


@functools.cache
def made(name, times, length=1, count=2048):
    """Samples (count,) of the second coordinate, where the first is known."""
    keys = random.example_keys(jax.random.key(1), count)
    known = Known(jnp.tile(jnp.array([[SEEN, 0.0]]), (count, 1)), jnp.array([[1.0, 0.0]]))
    table = make_table(name, SCHEDULE, 25, 1.0, "trailing", resampling=(times, length))
    run = functools.partial(sample, gaussian, sampler=SAMPLERS[name], known=known)
    noise = samplers.initial_noise(keys, (2,))
    return np.asarray(quick_jit(run)(noise, keys, table))[:, 1]


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_more_resampling_comes_closer_to_the_conditional_mean(name):
    exact = CORRELATION * SEEN  # 1.35
    errors = [abs(made(name, times).mean() - exact) for times in (1, 3, 10)]
    # 2048 samples: a standard error of 0.01; the errors are about 0.5, 0.2 and 0.11, of which the
    # last is that of 25 steps.
    assert errors[0] > errors[1] + 0.2 and errors[1] > errors[2] + 0.05
    assert errors[2] < 0.15


def test_longer_jumps_help_too_and_samples_follow_from_their_seeds():
    exact = CORRELATION * SEEN
    assert abs(made("ddpm", 6, 4).mean() - exact) < abs(made("ddpm", 1).mean() - exact) - 0.05
    # The same keys, in a smaller batch: float32 sums of another shape.
    np.testing.assert_allclose(made("ddpm", 3, 1, 64), made("ddpm", 3)[:64], atol=1e-4)


def test_noise_for_going_back_is_a_stream_of_its_own():
    keys = random.example_keys(jax.random.key(0), 2)
    draws = [samplers.initial_noise(keys, (50,))]
    for draw in (samplers.step_noise, samplers.known_noise, samplers.renoise):
        draws += [draw(keys, i, (50,)) for i in range(3)]
    flat = np.concatenate(draws).reshape(20, 50)
    assert np.abs(np.corrcoef(flat) - np.eye(20)).max() < 0.6


@pytest.mark.parametrize(
    "name", [name for name, s in SAMPLERS.items() if s.multistep and name != "flow_heun"]
)
def test_multistep_samplers_cannot_go_back(name):
    with pytest.raises(UserError, match=f"'{name}' .* resample with one of ddim, ddpm, euler"):
        make_table(name, SCHEDULE, 10, spacing="trailing", resampling=(2, 1))


@pytest.mark.parametrize(
    ("resampling", "message"),
    [((0, 1), "0 times"), ((1001, 1), "1 to 1000"), ((2, 0), "of 0 steps"), ((2, 10), "1 to 9")],
)
def test_values_outside_their_range(resampling, message):
    with pytest.raises(UserError, match=message):
        make_table("ddpm", SCHEDULE, 10, resampling=resampling)
