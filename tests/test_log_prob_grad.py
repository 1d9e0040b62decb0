"""The gradient that guides sampling is that of the classifier's log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import config as config_lib
from ldm_jax.networks import Networks

LABEL, T = np.array([0, 2, 1]), np.array([5.0, 300.5, 990.0], np.float32)
Z = np.random.RandomState(0).standard_normal((3, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    c = config_lib.get_config()
    c.data.update(resolution=8)
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.label.num_classes = 3
    c.classifier.update(width=32, mult=(1, 2), depth=1, attn_downsample=(2,), head_dim=16)
    networks, rng = Networks(c), np.random.RandomState(1)
    shapes = jax.eval_shape(networks.classifier.init, jax.random.key(0), Z, T)["params"]
    random = lambda x: (rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype("f4")  # noqa: E731
    return networks, {"classifier": jax.tree.map(random, shapes)}


@pytest.fixture(scope="module")
def gradient(model):
    compiled = quick_jit(model[0].log_prob_grad)
    return lambda z, label: np.asarray(compiled(model[1], z, T, label))


def test_it_is_the_slope_of_log_prob(model, gradient):
    networks, variables = model
    found = gradient(Z, LABEL)
    assert found.shape == Z.shape and found.dtype == np.float32

    @quick_jit
    def log_prob(z):
        logits = networks.classifier.apply({"params": variables["classifier"]}, z, T)
        return jax.nn.log_softmax(logits)[jnp.arange(3), LABEL]

    step = 1e-2
    for seed in range(4):
        direction = np.random.RandomState(seed).standard_normal(Z.shape).astype(np.float32)
        rise = (log_prob(Z + step * direction) - log_prob(Z - step * direction)) / (2 * step)
        slope = (found * direction).sum((1, 2, 3))
        # Central differences: an error of step^2, and of float32's 1e-7 / step.
        np.testing.assert_allclose(slope, rise, rtol=1e-2, atol=2e-3)
        assert np.abs(rise).max() > 1e-2


def test_it_depends_on_its_example_alone(model, gradient):
    found, others, labels = gradient(Z, LABEL), Z[::-1].copy(), (LABEL + 1) % 3
    others[1], labels[1] = Z[1], LABEL[1]
    np.testing.assert_allclose(gradient(others, labels)[1], found[1], atol=1e-6)
    assert np.abs(gradient(Z, labels) - found)[[0, 2]].max((1, 2, 3)).min() > 1e-3


def test_one_time_is_that_of_all(model):
    networks, variables = model
    shape = jax.eval_shape(networks.log_prob_grad, variables, Z, np.float32(3), LABEL)
    assert shape.shape == Z.shape


def test_gradients_of_all_classes_cancel_by_their_probability(model, gradient):
    """sum_y p(y | z) grad log p(y | z) = grad 1 = 0."""
    networks, variables = model
    logits = quick_jit(networks.classifier.apply)({"params": variables["classifier"]}, Z, T)
    p = np.asarray(jax.nn.softmax(logits))
    total = sum(p[:, k, None, None, None] * gradient(Z, np.full(3, k)) for k in range(3))
    np.testing.assert_allclose(total, 0, atol=1e-6)  # rounding of terms of size 0.1
