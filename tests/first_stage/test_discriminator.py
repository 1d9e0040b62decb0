"""The patch discriminator and its losses against the original code."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load, quick_jit

from ldm_jax.convert.losses import discriminator_from_flax, discriminator_to_flax
from ldm_jax.errors import UserError
from ldm_jax.first_stage.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)

WEIGHTS = np.float32([1.0, 2.0, 0.5])  # of the examples in `hinge_d_exemplar`


@functools.partial(quick_jit, static_argnums=0)
def evaluate(net, variables, real, generated):
    """Gradients of the hinge loss, every stored output, and the statistics after each call."""

    def everything(params):
        def train(stats, images):
            given = {"params": params, "batch_stats": stats}
            return net.apply(given, images, train=True, mutable=["batch_stats"])

        logits_real, after_real = train(variables["batch_stats"], real)
        logits_fake, after_both = train(after_real["batch_stats"], generated)
        hinge = discriminator_loss(logits_real, logits_fake)
        out = {
            "out.eval_logits_real": net.apply(variables, real),
            "out.eval_logits_fake": net.apply(variables, generated),
            "out.train_logits_real": logits_real,
            "out.train_logits_fake": logits_fake,
            "out.hinge_d": hinge,
            "out.vanilla_d": discriminator_loss(logits_real, logits_fake, "vanilla"),
            "out.g": generator_loss(logits_fake),
            "out.hinge_d_exemplar": discriminator_loss(logits_real, logits_fake, weights=WEIGHTS),
        }
        return hinge, (out, after_real, after_both)

    return jax.grad(everything, has_aux=True)(variables["params"])


@pytest.mark.parametrize("name", ["discriminator_0", "discriminator_1"])
def test_matches_the_original(name):
    golden = load(name)
    config = golden.meta["config"]
    net = PatchDiscriminator(config["ndf"], config["n_layers"])
    variables = discriminator_to_flax(golden.weights(), net)
    real, generated = golden.nhwc("in.real"), golden.nhwc("in.fake")
    gradients, (out, after_real, after_both) = evaluate(net, variables, real, generated)
    assert out.keys() == {key for key in golden.arrays if key.startswith("out.")}
    for key, value in out.items():
        golden.check(key, value)
    golden.check_gradients(discriminator_from_flax({"params": gradients}, net))

    theirs = discriminator_from_flax({**variables, **after_real}, net)
    stored = [key for key in golden.arrays if key.startswith("after_real.")]
    assert stored
    for key in stored:
        golden.check(key, theirs[key.removeprefix("after_real.")])
    # The second call moves on from where the first one left them.
    for path, value in flatten_dict(after_both).items():
        assert not np.array_equal(value, flatten_dict(after_real)[path]), path


def test_running_statistics_are_kept_unless_they_are_asked_for():
    net = PatchDiscriminator(8, 1)
    images = np.random.RandomState(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    variables = quick_jit(net.init)(jax.random.key(0), images)
    for path, value in flatten_dict(variables["batch_stats"]).items():
        np.testing.assert_array_equal(value, float(path[-1] == "var"), err_msg=str(path))

    @quick_jit
    def calls(variables):
        updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return net.apply(variables, images, train=True), updated, net.apply(variables, images)

    quiet, (logits, changed), evaluated = calls(variables)
    np.testing.assert_array_equal(quiet, logits)
    assert changed["batch_stats"]["norm_1"]["mean"].any()
    assert not np.allclose(quiet, evaluated)


def test_it_starts_from_the_published_distributions():
    shape = np.zeros((1, 32, 32, 3), np.float32)
    net = PatchDiscriminator(64, 2)
    params = quick_jit(net.init)(jax.random.key(0), shape)["params"]
    kernels = [np.asarray(params[f"conv_{i}"]["kernel"]) for i in (1, 2)]
    for kernel in kernels:
        np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=2e-4)
    scales = np.concatenate([np.asarray(params[f"norm_{i}"]["scale"]) for i in (1, 2)])
    np.testing.assert_allclose([scales.mean(), scales.std()], [1, 0.02], atol=4e-3)
    assert np.abs(params["conv_0"]["bias"]).max() <= 1 / np.sqrt(48)
    assert "bias" not in params["conv_1"]


def test_logits_are_float32_whatever_the_convolutions_compute_in():
    net = PatchDiscriminator(8, 2, dtype="bfloat16")
    images = jax.ShapeDtypeStruct((2, 32, 24, 3), np.float32)
    logits, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
    assert (logits.shape, logits.dtype) == ((2, 6, 4, 1), np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_small_images_and_unknown_losses_are_refused():
    images = np.zeros((1, 32, 23, 3), np.float32)
    with pytest.raises(UserError, match="3 layers needs images of at least 24x24, got 32x23"):
        jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), images)
    logits = np.zeros((1, 2, 2, 1), np.float32)
    with pytest.raises(UserError, match="'wgan': choose hinge or vanilla"):
        discriminator_loss(logits, logits, "wgan")
