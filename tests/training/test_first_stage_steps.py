"""The step that trains a first stage and its discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import builders, images, random
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.first_stage.discriminator import generator_loss
from ldm_jax.first_stage.losses import reconstruction_loss, regulariser
from ldm_jax.judges import perceptual_weights
from ldm_jax.run import run
from ldm_jax.training.first_stage_steps import first_stage_functions, trained_weights


@pytest.fixture(autouse=True)
def small_lpips(monkeypatch):
    monkeypatch.setattr(lpips_module, "VGG16", ((1, 4), (1, 4)))


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


@pytest.mark.parametrize(("kind", "adversarial"), [("kl", 0.5), ("vq", 0.0)])
def test_learns_one_batch(kind, adversarial):
    _, state, seen = train(toy(kind, adversarial), 30)
    assert seen[-1]["reconstruction"] < 0.9 * seen[0]["reconstruction"]
    assert all(np.isfinite(value) for value in seen[-1].values())
    if adversarial:  # it learns to tell the two apart, until the autoencoder has caught up
        gaps = [row["logits_real"] - row["logits_generated"] for row in seen]
        losses = [row["discriminator"] for row in seen]
        assert max(gaps) > gaps[0] + 0.02 and min(losses) < losses[0]
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


def test_black_images_leave_everything_finite():
    config = toy("vq", perceptual_weight=1.0, lpips="random", learn_log_variance=True)
    init, step = first_stage_functions(config)
    state, run = jax.jit(init)(jax.random.key(0)), jax.jit(step)
    black = {"image": np.zeros((8, 16, 16, 3), np.uint8)}
    for _ in range(3):
        state, metrics = run(state, perceptual_weights(config), black, jax.random.key(1))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((state.params, metrics)))


def test_perceptual_term_is_added_and_needs_weights(monkeypatch, tmp_path):
    config = toy(adversarial=0.0, perceptual_weight=1.0, lpips="random")
    _, _, seen = train(config, 1)
    assert seen[0]["perceptual"] != 0
    difference = seen[0]["reconstruction_error"] - seen[0]["reconstruction_mae"]
    np.testing.assert_allclose(difference, seen[0]["perceptual"], rtol=1e-4)
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path))
    config.first_stage.lpips = ""
    with pytest.raises(UserError, match=r"ldm_jax\.weights fetch lpips"):
        perceptual_weights(config)


def test_warm_up_then_ramp_of_the_adversarial_term():
    config = toy(start=1)
    config.first_stage.discriminator.update(warmup=1, ramp=2)
    first, _, seen = train(config, 6)
    factors = [row["adversarial_factor"] for row in seen]
    np.testing.assert_allclose(factors, [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    # In the warm-up the discriminator learns, and the autoencoder does not feel it.
    _, begun, _ = train(config, 2)
    _, alone, _ = train(toy(adversarial=0.0), 2)
    assert distance(first.params["discriminator"], begun.params["discriminator"]) > 0
    assert distance(begun.params["first_stage"], alone.params["first_stage"]) < 1e-6


def test_average_of_the_weights_is_kept():
    config = toy(adversarial=0.0, ema_decay=0.5)
    _, one, _ = train(config, 1)
    first, state, _ = train(config, 2)
    # The warm-up's decays of the first two updates are 2/11 and 3/12.
    average = first.params["first_stage"]
    for decay, params in ((2 / 11, one.params["first_stage"]), (0.25, state.params["first_stage"])):
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    assert distance(trained_weights(state), average) < 1e-6  # a few roundings of numbers below 1
    assert distance(trained_weights(state), state.params["first_stage"]) > 1e-4
    plain = train(toy(adversarial=0.0), 2)[1]
    assert trained_weights(plain) is plain.params["first_stage"]


def test_learnt_log_variance_nears_the_logarithm_of_the_error():
    # For a fixed error e, e / exp(s) + s is least at s = log(e).
    config = toy("vq", 0.5, learn_log_variance=True)
    config.first_stage.train.lr = 0.05
    _, state, seen = train(config, 60)
    wanted = np.log(seen[-1]["reconstruction_mae"])
    assert abs(float(state.params["observation"]["log_variance"]) - wanted) < 0.3 < -wanted


def test_lecam_remembers_both_logits():
    config = toy(start=0)
    config.first_stage.discriminator.lecam = 1.0
    _, state, seen = train(config, 2)
    for name in ("real", "generated"):  # averages from 0 that move by a hundredth per step
        values = [row[f"logits_{name}"] for row in seen]
        wanted = 0.99 * 0.01 * values[0] + 0.01 * values[1]
        np.testing.assert_allclose(state.stats["logits"][name], wanted, rtol=1e-4)
    real, generated = seen[0]["logits_real"], seen[0]["logits_generated"]
    # At averages of 0 it is the mean square of the logits.
    assert seen[0]["lecam"] >= real**2 + generated**2


def test_discriminator_learns_by_adamw_at_its_own_rate():
    def moved(**changes):
        config = toy(start=0)
        config.first_stage.train.update(lr=0.01, optimizer=changes.pop("optimizer", "adamw"))
        config.first_stage.discriminator.update(changes)
        first, state, _ = train(config, 1)
        return distance(first.params["discriminator"], state.params["discriminator"])

    # The first step of Adam is the learning rate, whatever the gradient.
    np.testing.assert_allclose(moved(lr=1e-3), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(moved(optimizer="muon"), 0.2 * 0.01, rtol=1e-3)


@pytest.mark.parametrize("rule", ["gradient", "ema"])
def test_unused_codes_come_back(rule):
    def alive(reset):
        config = toy("vq", adversarial=0.0, codes=256)
        config.first_stage.codebook.update(rule=rule, reset=reset)
        return train(config, 20)[2][-1]

    without, with_reset = alive(0.0), alive(0.05)
    assert with_reset["codes_alive"] > without["codes_alive"] < 0.5
    assert with_reset["code_perplexity"] > 2 * without["code_perplexity"]


def test_codebook_by_averages_has_no_gradient_and_follows_the_latents():
    config = toy("vq", adversarial=0.0)
    config.first_stage.codebook.update(rule="ema", decay=0.0)  # no memory
    first, state, _ = train(config, 1)
    module = builders.build_first_stage(config)
    params = {"params": first.params["first_stage"]}
    _, aux = module.apply(params, images.to_float(BATCH["image"]), None, method="autoencode")
    z, codes = np.asarray(aux["latents"]).reshape(-1, 3), np.asarray(aux["codes"]).ravel()
    for code in range(config.first_stage.codes):
        mine = z[codes == code]
        # Without memory a code is the mean of its latents, and stays where it is without any.
        wanted = mine.mean(0) if len(mine) else first.params["first_stage"]["codebook"][code]
        got = state.params["first_stage"]["codebook"][code]
        np.testing.assert_allclose(got, wanted, atol=1e-6)  # a sum of float32


def test_fsq_trains():
    config = toy("fsq", 0.5, levels=(5, 4, 3))
    _, state, seen = train(config, 30)
    assert seen[-1]["reconstruction"] < 0.9 * seen[0]["reconstruction"]
    assert 1 < seen[-1]["code_perplexity"] <= 60 and "codebook" not in seen[-1]
    assert "codebook" not in state.stats


@pytest.mark.slow
def test_resumed_with_every_option_ends_with_the_same_bits(tmp_path):
    config = toy("vq", start=0, ema_decay=0.9, learn_log_variance=True)
    config.first_stage.discriminator.update(lecam=0.1, warmup=1, ramp=2)
    config.first_stage.codebook.update(rule="ema", reset=0.05)
    config.first_stage.train.update(steps=4, checkpoint_every=2, picture_every=0, log_every=1)
    config.data.update(source="emoji", split="train[:16]", threads=1)
    config.first_stage.stats_images, config.train.steps = 8, 0
    run(config, tmp_path / "whole")
    config.first_stage.train.steps = 2
    run(config, tmp_path / "parts")
    (tmp_path / "parts" / "first_stage" / "weights.safetensors").unlink()
    config.first_stage.train.steps = 4
    run(config, tmp_path / "parts", allow_config_change=True)
    whole, parts = (
        (tmp_path / name / "first_stage" / "weights.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_start_beyond_the_end_is_warned_of(tmp_path, capsys):
    config = toy(start=1)
    config.first_stage.discriminator.warmup = 1
    config.first_stage.train.update(steps=2, picture_every=0)
    config.data.update(source="emoji", split="train[:8]", threads=1)
    config.first_stage.stats_images, config.train.steps = 8, 0
    run(config, tmp_path / "run")
    assert "warning: the adversarial term starts at step 2" in capsys.readouterr().out
