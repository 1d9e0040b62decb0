"""The classifier's update step: it learns the posterior of a problem whose answer is known."""

import math

import jax
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.training.classifier_steps import classifier_functions

SIDE, CLASSES, BATCH, MARK = 4, 2, 32, 0.6
FROZEN = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}


def tiny_config(**diffusion):
    """Pixels as latents and two classes, left or right half a little brighter than the other."""
    c = config_lib.get_config()
    c.data.update(resolution=SIDE, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.label.num_classes = CLASSES
    c.classifier.update(width=32, mult=(1,), depth=1, attn_downsample=(), head_dim=16)
    c.classifier.train.update(batch_size=BATCH, steps=120, lr=3e-3, weight_decay=0.0)
    c.diffusion.update(diffusion)
    c.sample.spacing = "trailing"
    return config_lib.check(c)


def batch():
    """'moments' (B, 4, 4, 3): +-MARK, with the sign of the half and of the class."""
    label = np.arange(BATCH, dtype=np.int32) % CLASSES
    half = np.where(np.arange(SIDE) < SIDE // 2, MARK, -MARK).astype(np.float32)
    image = np.broadcast_to(half[None, None, :, None], (BATCH, SIDE, SIDE, 3))
    sign = np.where(label == 0, 1, -1).astype(np.float32)
    return {"moments": image * sign[:, None, None, None], "label": label}


def train(config, steps):
    init, step = classifier_functions(config)
    state, run, data = quick_jit(init)(jax.random.key(0)), jax.jit(step), batch()
    rows = []
    for _ in range(steps):
        state, metrics = run(state, FROZEN, data, jax.random.key(1))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


@pytest.fixture(scope="module")
def trained():
    return train(tiny_config(), 120)


def test_it_learns_the_posterior(trained):
    """Two point masses 2 m apart: the log-odds are normal, of mean 2 d^2 and deviation 2 d with
    d = alpha |m| / sigma; the best classifier is right with probability Phi(d)."""
    state, rows = trained
    assert int(state.step) == len(rows) and state.ema_params == {}
    assert abs(rows[0]["loss"] - math.log(CLASSES)) < 0.3  # at first it knows nothing
    alpha, sigma = builders.build_schedule(tiny_config()).marginal(np.arange(1000))
    d = alpha * MARK * math.sqrt(SIDE * SIDE * 3) / sigma
    right = np.reshape([0.5 + 0.5 * math.erf(x / math.sqrt(2)) for x in d], (4, 250)).mean(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    odds = 2 * d[:, None] ** 2 + 2 * d[:, None] * nodes
    best = (np.logaddexp(0, -odds) @ weights / weights.sum()).reshape(4, 250).mean(1)
    late = rows[-40:]
    for q in range(4):
        accuracy = np.nanmean([row[f"accuracy_q{q}"] for row in late])
        loss = np.nanmean([row[f"loss_q{q}"] for row in late])
        # 320 draws in each quarter have a standard error of up to 0.03; it has seen few more.
        assert abs(accuracy - right[q]) < 0.1, (q, accuracy, right)
        assert abs(loss - best[q]) < 0.15, (q, loss, best)
    assert best[0] < 0.01 < 0.3 < best[3]  # so that the quarters cannot be mistaken
    whole = np.mean([row["accuracy"] for row in late])
    assert abs(whole - right.mean()) < 0.05


def test_it_trains_in_continuous_time():
    config = tiny_config(schedule="flow", predict="flow", times="logit_normal", times_mean=-9.0)
    rows = train(config, 3)[1]
    assert all(np.isfinite(row["loss"]) for row in rows)
    # Uniform over the clock, whatever the denoiser's times are.
    assert all(not math.isnan(row[f"loss_q{q}"]) for row in rows for q in range(4))
