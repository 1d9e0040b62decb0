"""The KL autoencoder against the original code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax import random
from ldm_jax.convert import compvis
from ldm_jax.first_stage import kl
from ldm_jax.first_stage.statistics import LatentStatistics

FIXTURES = ["ae_kl_stored", "ae_kl_small_weights", "ae_kl_f8_attn", "ae_kl_f8"]
FIXTURES.append(pytest.param("ae_kl_f4", marks=pytest.mark.slow))  # the blocks of f8, deeper


def from_config(config: dict) -> kl.AutoencoderKL:
    c = config["ddconfig"]
    return kl.AutoencoderKL(
        width=c["ch"],
        mult=tuple(c["ch_mult"]),
        depth=c["num_res_blocks"],
        attn_downsample=tuple(c["resolution"] // size for size in c["attn_resolutions"]),
        z_channels=c["z_channels"],
        channels=config["embed_dim"],
    )


@functools.partial(quick_jit, static_argnums=0)
def evaluate(net, params, images, noise, cotangent):
    """Gradients of sum(decode_sample * cotangent), and every stored output."""

    def forward(module, images):
        encoder = module.encoder(images)
        moments = module.quant_conv(encoder)
        mean, log_variance = kl.split_moments(moments)
        z = kl.sample_gaussian(moments, noise)
        decoded = module.decode_unscaled(jnp.concatenate([z, mean]))
        sample, mode = jnp.split(decoded, 2)
        return {
            "out.encoder": encoder,
            "out.moments": moments,
            "out.mean": mean,
            "out.logvar": log_variance,
            "out.kl": kl.kl_divergence(moments),
            "out.z_sample": z,
            "out.nll_of_eps": kl.negative_log_likelihood(moments, noise),
            "out.decode_mode": mode,
            "out.decode_sample": sample,
        }

    def scalar(params, images):
        out = net.apply({"params": params}, images, method=forward)
        return (out["out.decode_sample"] * cotangent).sum(), out

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, images)


@pytest.mark.parametrize("name", FIXTURES)
def test_matches_the_original(name):
    golden = load(name)
    net = from_config(golden.meta["config"])
    params = compvis.first_stage_to_flax(golden.weights(), net)
    noise, cotangent = golden.nhwc("in.eps"), golden.nhwc("in.cotangent")
    (grad_params, grad_x), out = evaluate(net, params, golden.nhwc("in.x"), noise, cotangent)
    for key, value in out.items():
        golden.check(key, value)
    golden.check("grad.x", grad_x)
    golden.check_gradients(compvis.first_stage_from_flax(grad_params, net))


def test_diagonal_gaussian_matches_the_original():
    golden = load("diagonal_gaussian")
    moments, other = golden.nhwc("in.moments"), golden.nhwc("in.moments_other")
    mean, log_variance = kl.split_moments(moments)
    mean_q, log_variance_q = kl.split_moments(other)
    spread = np.concatenate([np.zeros_like(mean), log_variance], -1)
    values = {
        "out.mean": mean,
        "out.logvar": log_variance,
        "out.std": kl.sample_gaussian(spread, np.ones_like(mean)),
        "out.var": np.exp(log_variance),
        "out.kl_standard": kl.kl_divergence(moments),
        "out.kl_other": kl.kl_divergence(moments, other),
        "out.nll": kl.negative_log_likelihood(other, golden.nhwc("in.sample")),
        "out.normal_kl": kl.normal_kl(mean_q, log_variance_q, np.float32(0), np.float32(0.3)),
    }
    for key, value in values.items():
        want = golden.nhwc(key) if golden[key].ndim == 4 else golden[key]
        np.testing.assert_allclose(value, want, rtol=2e-5, atol=1e-5, err_msg=key)


@functools.partial(quick_jit, static_argnums=0)
def scaled_latents(net, variables, images, noise):
    """Unscaled and scaled latents for given noise, and the decoded scaled ones."""

    def forward(module, images):
        z = kl.sample_gaussian(module.moments(images), noise)
        latents = module.scaled(z)
        return z, latents, module.decode(latents)

    return net.apply(variables, images, method=forward)


def test_latent_scale_matches_the_original():
    for name in ("latent_scale_factor", "latent_scale_by_std"):
        golden = load(name)
        net = from_config(golden.meta["config"])
        scale = np.full(3, golden.meta["config"].get("scale_factor", 1.0), np.float32)
        variables = {
            "params": compvis.first_stage_to_flax(golden.weights("first_stage_model."), net),
            "latents": {"shift": np.zeros(3, np.float32), "scale": scale},
        }
        noise = golden["in.noise"][0].transpose(0, 2, 3, 1)
        z, latents, decoded = scaled_latents(net, variables, golden["in.image"], noise)
        if name == "latent_scale_factor":
            golden.check("out.z", latents)
            golden.check("out.decoded", decoded)
        else:
            statistics = LatentStatistics(3)
            statistics.add(z)
            golden.check("out.scale_factor", statistics.result("first_batch")[1][0])


def test_samples_differ_from_the_mode_by_their_standard_deviation():
    net = kl.AutoencoderKL(
        width=32, mult=(1,), depth=1, attn_downsample=(), z_channels=2, channels=2
    )
    moments = np.zeros((2, 64, 64, 4), np.float32) + np.array([1, 2, 0, 2 * np.log(3)], np.float32)
    variables = {"latents": {"shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}}
    keys = random.example_keys(jax.random.key(0), 2)
    z = net.apply(variables, moments, keys, method="sample")
    mode = net.apply(variables, moments, method="mode")
    np.testing.assert_array_equal(mode[0, 0, 0], [1, 2])
    np.testing.assert_allclose(z.mean((0, 1, 2)), [1, 2], atol=0.1)
    np.testing.assert_allclose(z.std((0, 1, 2)), [1, 3], rtol=0.05)
    alone = net.apply(variables, moments[1:], keys[1:], method="sample")
    np.testing.assert_array_equal(alone[0], z[1])
