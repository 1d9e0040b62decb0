"""Optimisers and their schedules, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_utils import load

from ldm_jax import config as config_lib
from ldm_jax.training.optim import learning_rate, make_optimizer, without_decay


def block(**changes):
    train = config_lib.get_config().train
    train.update(**changes)
    return train


def test_schedules():
    constant = learning_rate(block(lr=0.1))
    assert float(constant(0)) == float(constant(10**6)) == pytest.approx(0.1)
    warm = learning_rate(block(lr=0.1, warmup_steps=10))
    np.testing.assert_allclose(
        [warm(0), warm(5), warm(10), warm(99)], [1e-7, 0.05, 0.1, 0.1], 1e-5, 1e-8
    )
    cosine = learning_rate(block(lr=0.1, warmup_steps=10, steps=110, lr_decay="cosine"))
    np.testing.assert_allclose([cosine(10), cosine(60), cosine(110)], [0.1, 0.05, 0.0], atol=1e-7)


def test_adamw_is_that_of_pytorch():
    """Three steps by the formula of torch.optim.AdamW: eps 1e-8, decay on everything."""
    rate, decay, (b1, b2) = 1e-2, 0.01, (0.9, 0.999)
    optimizer = make_optimizer(block(lr=rate, weight_decay=decay))
    params = {"bias": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    p, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for i, grad in enumerate(np.random.default_rng(0).standard_normal((3, 3)), start=1):
        updates, state = optimizer.update({"bias": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        p = p * (1 - rate * decay)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        p = p - rate * (m / (1 - b1**i)) / (np.sqrt(v / (1 - b2**i)) + 1e-8)
        np.testing.assert_allclose(params["bias"], p, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_spares_what_it_should_and_changes_nothing_else(kind):
    usual = make_optimizer(block(lr=1e-2, weight_decay=0.5, optimizer=kind, grad_clip=1.0))
    kernel = jnp.arange(6.0).reshape(2, 3) / 6
    params = {"weights": {"kernel": kernel, "bias": jnp.ones(3)}, "statistics": jnp.ones(4)}
    grads = jax.tree.map(lambda leaf: 0.1 + leaf, params)
    spared = without_decay(usual, ["statistics"])
    state = usual.init(params)
    assert jax.tree.structure(spared.init(params)) == jax.tree.structure(state)
    plain, _ = usual.update(grads, state, params)
    ours, _ = spared.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, ours["weights"], plain["weights"])
    none = make_optimizer(block(lr=1e-2, weight_decay=0.0, optimizer=kind, grad_clip=1.0))
    free, _ = none.update(grads, none.init(params), params)
    np.testing.assert_array_equal(ours["statistics"], free["statistics"])
    assert (plain["statistics"] != free["statistics"]).all()


@pytest.mark.parametrize("name", ["adamw_ldm", "adam_autoencoder"])
def test_optimizer_steps_fixture(name):
    golden = load("optimizer_steps")
    options = golden.meta["config"][name]
    optimizer = make_optimizer(
        block(
            lr=options["lr"],
            betas=tuple(options["betas"]),
            weight_decay=float(options["weight_decay"]),
        )
    )
    params = {"bias": jnp.asarray(golden["in.param_0"])}
    state = optimizer.init(params)
    for i in range(1, 6):
        grads = {"bias": jnp.asarray(golden[f"in.grad_{i}"])}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["bias"], golden[f"{name}.param_{i}"], rtol=1e-5)


def cycle(warm_up, start, low, high, length):
    """One cycle of a schedule of the original code, as settings here."""
    return learning_rate(
        block(
            lr=high,
            warmup_steps=warm_up,
            lr_start=start / high,
            lr_end=low / high,
            decay_steps=length,
            lr_decay="cosine",
        )
    )


def test_lr_schedules_fixture():
    golden = load("lr_schedules")
    steps, configs = golden["in.steps"], golden.meta["config"]
    with jax.enable_x64(True):  # the fixture is float64
        c = configs["warmup_cosine"][1]
        one = cycle(
            c["warm_up_steps"], c["lr_start"], c["lr_min"], c["lr_max"], c["max_decay_steps"]
        )
        c = configs["warmup_cosine2"][1]
        names = ("warm_up_steps", "f_start", "f_min", "f_max", "cycle_lengths")
        first, second = (cycle(*(c[name][i] for name in names)) for i in (0, 1))
        end = c["cycle_lengths"][0]  # whose last value is the first cycle's
        c = {key: value[0] for key, value in configs["linear"][1].items()}
        line = learning_rate(
            block(
                lr=c["f_max"],
                warmup_steps=c["warm_up_steps"],
                lr_start=c["f_start"],
                lr_end=c["f_min"],
                decay_steps=c["cycle_lengths"],
                lr_decay="linear",
            )
        )
        ours = {
            "warmup_cosine": [one(n) for n in steps],
            "warmup_cosine2": [first(n) if n <= end else second(n - end) for n in steps],
            "linear": [line(n) for n in steps],
        }
    for name, values in ours.items():
        np.testing.assert_allclose(values, golden[name], rtol=1e-9, err_msg=name)
    in_float32 = [cycle(100, 0.001, 0.0001, 0.1, 1000)(n) for n in steps]
    np.testing.assert_allclose(in_float32, golden["warmup_cosine"], rtol=1e-5)


def test_a_line_falls_from_step_zero():
    line = learning_rate(
        block(lr=0.1, warmup_steps=10, lr_decay="linear", lr_end=0.2, decay_steps=100)
    )
    np.testing.assert_allclose(
        [line(9), line(10), line(50), line(100), line(500)],
        [0.09, 0.092, 0.06, 0.02, 0.02],
        rtol=1e-4,
    )


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    optimizer = make_optimizer(block(optimizer="muon", lr=1.0, weight_decay=0.0))
    key = jax.random.key(0)
    params = {
        "kernel": jnp.zeros((3, 3, 4, 8)),
        "bias": jnp.zeros(8),
        "embedding": jnp.zeros((9, 8)),
    }
    grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["kernel"]).reshape(36, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2  # five Newton-Schulz steps: 0.7 to 1.2
    for name in ("bias", "embedding"):  # Adam's first step has the same size everywhere
        size = np.abs(updates[name])
        np.testing.assert_allclose(size, size.flat[0], rtol=1e-3)
        assert 0.2 < size.flat[0] < 0.3  # the rate, and more by Nesterov's look ahead


def test_clipping_bounds_the_gradient():
    optimizer = make_optimizer(block(grad_clip=1.0, lr=1.0, betas=(0.0, 0.0), weight_decay=0.0))
    params = {"bias": jnp.zeros(4)}
    big = {"bias": jnp.full(4, 100.0)}
    _, state = optimizer.update(big, optimizer.init(params), params)
    first_moment = jax.tree.leaves(state)[1]
    np.testing.assert_allclose(np.linalg.norm(first_moment), 1.0, rtol=1e-6)
