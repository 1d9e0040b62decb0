"""Drawn times against their quantiles."""

import jax
import numpy as np
import pytest

from ldm_jax import random
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.diffusion.times import TIMES, Times, check_times, draw_times
from ldm_jax.errors import UserError

COUNT = 20000
NORMAL = np.array([-1.2815516, 0.0, 1.2815516])  # 10th, 50th and 90th percentile
SHARES = np.array([0.1, 0.5, 0.9])


def expit(x):
    return 1 / (1 + np.exp(-x))


def draws(process, times):
    keys = random.example_keys(jax.random.key(5), COUNT)
    t = np.asarray(jax.jit(lambda keys: draw_times(keys, process, times))(keys))
    assert t.shape == (COUNT,) and (t > 0).all() and (t <= process.steps).all()
    return t


LOG = LogSNR((0.002, 80.0))
SPAN = np.log(80 / 0.002)


@pytest.mark.parametrize(
    "process, times, u",
    [
        (Flow(), Times(), SHARES),
        (Flow(500), Times(shift=3.0), 3 * SHARES / (1 + 2 * SHARES)),
        (Flow(), Times("logit_normal", 0.5, 2.0), expit(0.5 + 2 * NORMAL)),
        # Shifting multiplies sigma / alpha = u / (1 - u).
        (Flow(), Times("logit_normal", 0.5, 2.0, 3.0), expit(0.5 + np.log(3) + 2 * NORMAL)),
        (Flow(), Times("log_normal", -1.2, 1.2), expit(-1.2 + 1.2 * NORMAL)),
        (LOG, Times(), SHARES),
        (LOG, Times("log_normal", -1.2, 1.2), (-1.2 + 1.2 * NORMAL - np.log(0.002)) / SPAN),
        (LOG, Times("logit_normal", 0.0, 1.0), expit(NORMAL)),
    ],
)
def test_quantiles(process, times, u):
    t = draws(process, times)
    below = [(t < process.steps * quantile).mean() for quantile in u]
    # Four standard deviations of a share of 20000 draws.
    np.testing.assert_allclose(below, SHARES, atol=4 * 0.5 / np.sqrt(COUNT))


def test_log_normal_times_have_log_normal_ratios():
    t = draws(LOG, Times("log_normal", -1.2, 1.2))
    level = LOG.level(t, 1)
    logs = np.log(np.asarray(level.sigma / level.alpha))
    np.testing.assert_allclose([logs.mean(), logs.std()], [-1.2, 1.2], atol=0.04)


@pytest.mark.parametrize("kind", TIMES[1:])
def test_extreme_draws_stay_on_the_clock(kind):
    for process in (Flow(), LOG):
        t = draws(process, Times(kind, std=50.0))
        assert t.min() < process.steps / 1000 and t.max() == process.steps
        level = process.level(t, 1)
        assert np.isfinite(level.alpha).all() and (np.asarray(level.sigma) > 0).all()


@pytest.mark.parametrize(
    "times, message",
    [
        (Times("cosine"), "uniform, logit_normal, log_normal"),
        (Times(std=0.0), "std of times must be above 0"),
        (Times(shift=-1.0), "shift of times must be above 0"),
        (Times("log_normal"), "continuous time"),
        (Times(shift=3.0), "continuous time"),
    ],
)
def test_bad_times(times, message):
    with pytest.raises(UserError, match=message):
        check_times(times, make_schedule())
