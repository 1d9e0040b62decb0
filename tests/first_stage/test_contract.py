"""What every first stage promises, whatever its kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import random
from ldm_jax.errors import UserError
from ldm_jax.first_stage.fsq import FSQModel
from ldm_jax.first_stage.identity import Identity
from ldm_jax.first_stage.kl import AutoencoderKL
from ldm_jax.first_stage.vq import VQModel

SHAPE = dict(width=32, mult=(1, 1), depth=1, attn_downsample=(), z_channels=2, channels=4)
KL, VQ = AutoencoderKL(**SHAPE), VQModel(**SHAPE, codes=16)
FSQ = FSQModel(**SHAPE, levels=(3, 4, 5, 3))
# The module, the channels of its moments, its latents' shape for 16x16 images.
CASES = [(Identity(), 3, (16, 16, 3)), (KL, 8, (8, 8, 4)), (VQ, 4, (8, 8, 4))]
CASES += [(FSQ, 4, (8, 8, 4))]
IMAGES = np.random.RandomState(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
KEYS = random.example_keys(jax.random.key(0), 2)


@pytest.mark.parametrize(("net", "moment_channels", "latent"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(net, moment_channels, latent, dtype):
    if not isinstance(net, Identity):
        net = dataclasses.replace(net, dtype=jnp.dtype(dtype))

    def everything(images, keys):
        _, variables = net.init_with_output(jax.random.key(0), images, keys)
        moments = net.apply(variables, images, method="moments")
        latents = net.apply(variables, moments, keys, method="sample")
        mode = net.apply(variables, moments, method="mode")
        decoded = net.apply(variables, latents, method="decode")
        reconstruction, aux = net.apply(variables, images, keys)
        return variables, (moments, latents, mode, decoded, reconstruction), aux

    variables, arrays, aux = jax.eval_shape(everything, IMAGES, KEYS)
    moments = (2, *latent[:2], moment_channels)
    want = [moments, (2, *latent), (2, *latent), IMAGES.shape, IMAGES.shape]
    assert [a.shape for a in arrays] == want
    if "codes" in aux:
        assert aux.pop("codes").dtype == np.int32
    assert {a.dtype for a in jax.tree.leaves((variables, arrays, aux))} == {np.dtype(np.float32)}
    assert jax.tree.map(jnp.shape, variables["latents"]) == {
        "shift": latent[-1:],
        "scale": latent[-1:],
    }


@pytest.mark.parametrize(("net", "moment_channels", "latent"), CASES)
def test_decode_undoes_the_scaling(net, moment_channels, latent):
    channels = latent[-1]
    shift, scale = np.arange(channels, dtype=np.float32), np.full(channels, 3.0, np.float32)
    z = np.random.RandomState(1).standard_normal((2, *latent)).astype(np.float32)
    variables = {"latents": {"shift": shift, "scale": scale}}
    if isinstance(net, VQModel):
        variables["params"] = {"codebook": np.zeros((net.codes, channels), np.float32)}
    scaled = net.apply(variables, z, method="scaled")
    np.testing.assert_allclose(scaled, (z - shift) * 3, rtol=1e-6)
    np.testing.assert_allclose(net.apply(variables, scaled, method="unscaled"), z, atol=1e-6)
    with pytest.raises(ValueError, match="latents"):
        net.apply({"params": variables.get("params", {})}, z, method="scaled")


def test_autoencode_trains_without_the_latents_collection():
    net = dataclasses.replace(KL, mult=(1,), depth=0)
    params = quick_jit(net.init)(jax.random.key(0), IMAGES, KEYS)["params"]

    def loss(params):
        reconstruction, aux = net.apply({"params": params}, IMAGES, KEYS, train=True)
        return jnp.square(reconstruction).mean() + aux["kl"].mean()

    gradients = quick_jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert gradients["encoder"]["conv_in"]["kernel"].any()


def test_identity_keeps_pixels():
    variables = Identity().init(jax.random.key(0), IMAGES, KEYS)
    moments = Identity().apply(variables, IMAGES, method="moments")
    latents = Identity().apply(variables, moments, KEYS, method="sample")
    np.testing.assert_array_equal(Identity().apply(variables, latents, method="decode"), IMAGES)


@pytest.mark.parametrize(
    ("net", "size", "message"),
    [
        (KL, 15, "multiples of 2, got 15x15"),
        (dataclasses.replace(KL, width=40), 16, "multiple of 32 channels, got 40"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(net, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), np.zeros((2, size, size, 3), np.float32), KEYS)
