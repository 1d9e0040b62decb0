"""The step that trains a first stage and its discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import builders, images, random
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.first_stage.discriminator import generator_loss
from ldm_jax.first_stage.losses import reconstruction_loss, regulariser
from ldm_jax.run import perceptual_weights
from ldm_jax.training.first_stage_steps import first_stage_functions

BATCH = {"image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)}


def toy(kind="kl", adversarial=0.5, start=0, **changes):
    c = config_lib.get_config()
    c.data.resolution = 16
    c.first_stage.update(kind=kind, width=32, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, codes=64, log_variance=-6.0, perceptual_weight=0.0)
    c.first_stage.discriminator.update(weight=adversarial, layers=1, width=8, start=start)
    c.first_stage.train.update(batch_size=8, lr=3e-3, betas=(0.9, 0.99))
    c.first_stage.update(changes)
    return c


def train(config, steps):
    """The states before and after some steps, and the metrics of each step."""
    init, step = first_stage_functions(config)
    state = first = jax.jit(init)(jax.random.key(0))
    run, seen = jax.jit(step), []
    for _ in range(steps):
        state, metrics = run(state, perceptual_weights(config), BATCH, jax.random.key(1))
        seen.append({name: float(value) for name, value in metrics.items()})
    return first, state, seen


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


@pytest.mark.parametrize(("kind", "adversarial"), [("kl", 0.5), ("vq", 0.5), ("vq", 0.0)])
def test_learns_one_batch(kind, adversarial):
    _, state, seen = train(toy(kind, adversarial), 30)
    assert seen[-1]["reconstruction"] < 0.9 * seen[0]["reconstruction"]
    assert all(np.isfinite(value) for value in seen[-1].values())
    if adversarial:  # it learns to tell the two apart
        gaps = [row["logits_real"] - row["logits_generated"] for row in seen]
        assert gaps[-1] > gaps[0] and seen[-1]["discriminator"] < seen[0]["discriminator"]
    assert state.params.keys() == (
        {"first_stage", "discriminator"} if adversarial else {"first_stage"}
    )


def test_before_its_start_the_discriminator_changes_nothing():
    first, state, seen = train(toy(start=3), 3)
    _, alone, _ = train(toy(adversarial=0.0), 3)
    assert distance(first.params["discriminator"], state.params["discriminator"]) == 0
    assert distance(state.params["first_stage"], alone.params["first_stage"]) < 1e-6
    assert seen[-1]["adversarial_factor"] == 0 and seen[-1]["adaptive_weight"] > 0
    # It watches, though: its statistics are ready when it starts.
    assert distance(first.stats, state.stats) > 0


def test_gradient_is_that_of_the_written_out_loss():
    config = toy(start=0)
    init, step = first_stage_functions(config)
    state = jax.jit(init)(jax.random.key(0))
    _, metrics = jax.jit(step)(state, {}, BATCH, jax.random.key(1))

    module, judge = builders.build_first_stage(config), builders.build_discriminator(config)
    image = images.to_float(BATCH["image"])
    step_key = jax.random.fold_in(jax.random.key(1), 0)
    keys = random.fold_in(random.example_keys(step_key, 8), 0)
    discriminator = {
        "params": state.params["discriminator"],
        "batch_stats": state.stats["discriminator"],
    }

    def loss(params):
        output, aux = module.apply({"params": params}, image, keys, train=True)
        term, _ = regulariser(aux, kind="kl", kl_weight=config.first_stage.kl_weight)
        error, _ = reconstruction_loss(output, image, kind="kl")
        logits, _ = judge.apply(discriminator, output, True, mutable=["batch_stats"])
        return error.mean() + term + metrics["adaptive_weight"] * generator_loss(logits)

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params["first_stage"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_perceptual_term_is_added_and_needs_weights(monkeypatch, tmp_path):
    config = toy(adversarial=0.0, perceptual_weight=1.0, lpips="random")
    _, _, seen = train(config, 1)
    assert seen[0]["perceptual"] > 0
    difference = seen[0]["reconstruction_error"] - seen[0]["reconstruction_mae"]
    np.testing.assert_allclose(difference, seen[0]["perceptual"], rtol=1e-4)
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path))
    config.first_stage.lpips = ""
    with pytest.raises(UserError, match=r"ldm_jax\.weights fetch lpips"):
        perceptual_weights(config)
