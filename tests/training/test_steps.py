"""The update steps: they learn, and neither devices nor cached latents change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.training.sharding import batch_sharding, make_mesh, replicated
from ldm_jax.training.steps import diffusion_functions


def tiny_config(**train):
    """Diffusion on 8x8 pixels by class: one level, no first stage, seconds to compile."""
    c = config_lib.get_config()
    c.data.update(resolution=8, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=(1,))
    c.conditioners = ("label",)
    c.label.update(num_classes=4, width=128, slot="vector")
    c.train.update(batch_size=8, lr=1e-3, **train)
    c.cond_drop_rate = 0.2
    return config_lib.check(c)


FROZEN = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
    "label": np.arange(8, dtype=np.int32) % 4,
}


def losses(config, devices, batch, steps):
    mesh = make_mesh(devices=jax.devices()[:devices])
    init, step = diffusion_functions(config)
    everywhere = replicated(mesh)
    state = jax.jit(lambda: init(jax.random.key(0)), out_shardings=everywhere)()
    run = jax.jit(step, out_shardings=everywhere)
    batch = jax.device_put(batch, batch_sharding(mesh))
    key = jax.device_put(jax.random.key(1), everywhere)
    values = []
    for _ in range(steps):
        state, metrics = run(state, FROZEN, batch, key)
        values.append(float(metrics["loss"]))
    return np.array(values), state


@pytest.fixture(scope="module")
def one_device():
    return losses(tiny_config(), 1, BATCH, 20)


def test_loss_does_not_depend_on_the_number_of_devices(one_device):
    eight, _ = losses(tiny_config(), 8, BATCH, 20)
    # 20 updates amplify the rounding of sums in another order; 1e-5 as promised to users.
    np.testing.assert_allclose(eight, one_device[0], rtol=1e-5)


def test_loss_falls(one_device):
    values, state = one_device
    assert values[0] > 0.8  # the output starts at zero, and the noise has variance 1
    assert values[-5:].mean() < 0.8 * values[0]
    assert int(state.step) == 20


def test_moments_instead_of_images_change_nothing(one_device):
    moments = BATCH["image"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    cached = {"moments": moments, "label": BATCH["label"]}
    values, _ = losses(tiny_config(), 1, cached, 3)
    np.testing.assert_allclose(values, one_device[0][:3], rtol=1e-6)


def test_average_follows_the_denoiser_only(one_device):
    _, state = one_device
    assert set(state.ema_params) == {"denoiser"}
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.ema_params["denoiser"],
                         state.params["denoiser"])  # fmt: skip
    assert max(map(float, jax.tree.leaves(moved))) > 0


def test_bfloat16_keeps_float32_weights_and_loss():
    config = tiny_config(dtype="bfloat16")
    init, step = diffusion_functions(config)
    state, metrics = jax.eval_shape(
        step, jax.eval_shape(init, jax.random.key(0)), FROZEN, BATCH, jax.random.key(1)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    text = str(jax.make_jaxpr(step)(
        jax.eval_shape(init, jax.random.key(0)), FROZEN, BATCH, jax.random.key(1)
    ))  # fmt: skip
    assert "bf16" in text


OBJECTIVES = {
    "flow": dict(schedule="flow", predict="flow", times="logit_normal", learn_log_variance=True),
    "edm": dict(schedule="log_snr", predict="edm", sigma_data=0.5, times="log_normal"),
    "zero_snr": dict(zero_terminal_snr=True, predict="v", weighting="min_snr", loss="huber"),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_kind_of_objective_trains(kind):
    config = tiny_config()
    config.diffusion.update(OBJECTIVES[kind])
    init, step = diffusion_functions(config_lib.check(config))
    state, metrics = jax.jit(init)(jax.random.key(0)), {}
    run, seen = jax.jit(step), []
    for _ in range(12):
        state, metrics = run(state, FROZEN, BATCH, jax.random.key(1))
        seen.append(float(metrics["loss_simple"]))
    assert np.isfinite(seen).all() and np.mean(seen[-4:]) < np.mean(seen[:4])
    quartiles = np.array([metrics[f"loss_q{q}"] for q in range(4)])
    assert np.isfinite(quartiles).any()
    if kind == "flow":
        assert set(state.ema_params) == {"denoiser"}
        values = state.params["log_variance"]["values"]
        assert (np.asarray(values) != 0).all() and np.isfinite(metrics["log_variance"])
        assert metrics["loss"] != metrics["loss_simple"]
    else:
        assert "log_variance" not in state.params


def test_a_learned_log_variance_does_not_decay():
    """Of a rate of one and no gradient, weight decay alone would halve it."""
    config = tiny_config(weight_decay=0.5, grad_clip=1e-30).unlock()
    config.diffusion.learn_log_variance = True
    config.train.lr = 1.0
    init, step = diffusion_functions(config)
    state = jax.jit(init)(jax.random.key(0))
    values = jnp.full_like(state.params["log_variance"]["values"], 4.0)
    state = state.replace(params=state.params | {"log_variance": {"values": values}})
    new, _ = jax.jit(step)(state, FROZEN, BATCH, jax.random.key(1))
    # Clipped gradients of 1e-30 vanish beside Adam's eps of 1e-8.
    np.testing.assert_allclose(new.params["log_variance"]["values"], values, rtol=1e-6)
    kernel = lambda state: state.params["denoiser"]["conv_in"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(kernel(new), 0.5 * kernel(state), rtol=1e-5, atol=1e-12)


def test_quartiles_are_means_of_the_plain_error():
    init, step = diffusion_functions(config_lib.check(tiny_config()))
    state = jax.jit(init)(jax.random.key(0))
    _, metrics = jax.jit(step)(state, FROZEN, BATCH, jax.random.key(1))
    quartiles = np.array([metrics[f"loss_q{q}"] for q in range(4)])
    # The first output is zero: every example's error is that of its noise, near 1.
    assert (np.isnan(quartiles) | (np.abs(quartiles - 1) < 0.4)).all()
    assert metrics["loss"] == metrics["loss_simple"]
