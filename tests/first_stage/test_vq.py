"""The VQ autoencoder against the original code, and the quantiser on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax.convert import compvis
from ldm_jax.first_stage import vq
from ldm_jax.first_stage.vq import VQModel, codebook_init, nearest_codes, quantise

FIXTURES = ["ae_vq_f4", "ae_vq_f8"]
FIXTURES.append(pytest.param("ae_vq_f4_noattn", marks=pytest.mark.slow))  # the same less attention


def from_config(config: dict) -> VQModel:
    c = config["ddconfig"]
    return VQModel(
        width=c["ch"],
        mult=tuple(c["ch_mult"]),
        depth=c["num_res_blocks"],
        attn_downsample=tuple(c["resolution"] // size for size in c["attn_resolutions"]),
        mid_attn=c.get("attn_type") != "none",
        z_channels=c["z_channels"],
        channels=config["embed_dim"],
        codes=config["n_embed"],
        beta=config["beta"],
    )


@functools.partial(quick_jit, static_argnums=0)
def evaluate(net, params, images, cotangent):
    """Gradients of sum(decode * cotangent) + 100 * legacy codebook loss, and every output."""

    def forward(module, images):
        z = module.moments(images)
        legacy = quantise(z, module.codebook, module.beta, legacy_beta=True)
        corrected = quantise(z, module.codebook, module.beta, legacy_beta=False)
        decoded = module.decode_unscaled(jnp.concatenate([legacy.z_q, z]))
        quantised, not_quantised = jnp.split(decoded, 2)
        return {
            "out.prequant": z,
            "out.quant": legacy.z_q,
            "out.codebook_loss_legacy": legacy.loss.mean(),
            "out.codebook_loss_nonlegacy": corrected.loss.mean(),
            "out.codebook_entry": module.codebook[legacy.codes],
            "out.decode": quantised,
            "out.interface_decode_not_quantized": not_quantised,
        }, legacy.codes.reshape(-1)

    def scalar(params, images):
        out, codes = net.apply({"params": params}, images, method=forward)
        total = (out["out.decode"] * cotangent).sum() + 100 * out["out.codebook_loss_legacy"]
        return total, (out, codes)

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, images)


@pytest.mark.parametrize("name", FIXTURES)
def test_matches_the_original(name):
    golden = load(name)
    net = from_config(golden.meta["config"])
    params = compvis.first_stage_to_flax(golden.weights(), net)
    images, cotangent = golden.nhwc("in.x"), golden.nhwc("in.cotangent")
    (grad_params, grad_x), (out, codes) = evaluate(net, params, images, cotangent)
    np.testing.assert_array_equal(codes, golden["out.indices"])
    for key, value in out.items():
        golden.check(key, value)
    golden.check("grad.x", grad_x)
    golden.check("grad.codebook", grad_params["codebook"])
    golden.check_gradients(compvis.first_stage_from_flax(grad_params, net))


def test_decode_quantises_as_the_interface_of_the_original_does():
    golden = load("ae_vq_f8")
    net = from_config(golden.meta["config"])
    variables = {
        "params": compvis.first_stage_to_flax(golden.weights(), net),
        "latents": {"shift": np.full(4, 0.5, np.float32), "scale": np.full(4, 2.0, np.float32)},
    }

    @functools.partial(quick_jit, static_argnums=1)
    def decode(latents, quantize):
        return net.apply(variables, latents, quantize, method="decode")

    latents = net.apply(variables, golden.nhwc("out.prequant"), method="mode")
    np.testing.assert_allclose(latents, 2 * (golden.nhwc("out.prequant") - 0.5), atol=1e-6)
    golden.check("out.interface_decode", decode(latents, True))
    golden.check("out.interface_decode_not_quantized", decode(latents, False))


def test_nearest_codes_are_the_nearest():
    rng = np.random.RandomState(0)
    z, codebook = rng.standard_normal((2, 5, 7, 3)), rng.standard_normal((11, 3))
    distances = ((z[..., None, :] - codebook) ** 2).sum(-1)
    codes = nearest_codes(z.astype(np.float32), codebook.astype(np.float32))
    np.testing.assert_array_equal(codes, distances.argmin(-1))


@pytest.mark.parametrize("legacy", [True, False])
def test_gradients_reach_latents_straight_and_only_used_codes(legacy):
    rng = np.random.RandomState(1)
    z = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    codebook = rng.standard_normal((64, 4)).astype(np.float32)
    codes = np.asarray(nearest_codes(z, codebook))
    through = jax.grad(lambda z: (quantise(z, codebook, 0.25, legacy).z_q * 3).sum())(z)
    np.testing.assert_array_equal(through, np.full_like(z, 3))

    def loss(z, codebook):
        return quantise(z, codebook, 0.25, legacy).loss.sum()

    grad_z, grad_codebook = jax.grad(loss, argnums=(0, 1))(z, codebook)
    commitment, movement = (1.0, 0.25) if legacy else (0.25, 1.0)
    difference = (z - codebook[codes]) * 2 / z[0].size
    np.testing.assert_allclose(grad_z, commitment * difference, rtol=1e-5, atol=1e-7)
    want = np.zeros_like(codebook)
    np.add.at(want, codes.reshape(-1), -movement * difference.reshape(-1, 4))
    np.testing.assert_allclose(grad_codebook, want, rtol=1e-5, atol=1e-7)


def test_codebook_starts_uniform():
    codebook = np.asarray(codebook_init(jax.random.key(0), (512, 4)))
    assert np.abs(codebook).max() <= 1 / 512
    np.testing.assert_allclose(codebook.std(), 1 / 512 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("most", [1, 7 * 13, 7 * 40, 2**26])
def test_nearest_codes_do_not_depend_on_the_memory_they_may_use(most, monkeypatch):
    monkeypatch.setattr(vq, "MOST_DISTANCES", most)
    keys = jax.random.split(jax.random.key(0))
    z, codebook = jax.random.normal(keys[0], (7, 3)), jax.random.normal(keys[1], (40, 3))
    codebook = codebook.at[30].set(codebook[2])  # of two equal ones the first counts
    z = z.at[0].set(codebook[2])
    wanted = jnp.square(z[:, None] - codebook[None]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest_codes(z, codebook), wanted)
    assert wanted[0] == 2
