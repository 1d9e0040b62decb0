"""Autoencoder with a diagonal Gaussian bottleneck (Rombach et al. 2022, section 3.1, "KL-reg.").

`moments` are the mean and the log-variance of the posterior, joined along the channels.
"""

from __future__ import annotations

import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.first_stage.autoencoder import Autoencoder
from ldm_jax.nn.layers import uniform_fan_in
from ldm_jax.types import Array


def split_moments(moments: Array) -> tuple[Array, Array]:
    """(..., 2C) -> mean (..., C) and log-variance (..., C), the latter clipped to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def sample_gaussian(moments: Array, noise: Array) -> Array:
    """Moments (..., 2C) and standard normal noise (..., C) -> mean + std * noise."""
    mean, log_variance = split_moments(moments)
    return mean + jnp.exp(0.5 * log_variance) * noise


def normal_kl(mean: Array, log_variance: Array, mean_q: Array, log_variance_q: Array) -> Array:
    """KL(p || q) in nats of one-dimensional Gaussians, element by element."""
    ratio = jnp.exp(log_variance - log_variance_q)
    distance = jnp.square(mean - mean_q) * jnp.exp(-log_variance_q)
    return 0.5 * (log_variance_q - log_variance + ratio + distance - 1.0)


def kl_divergence(moments: Array, other: Array | None = None) -> Array:
    """KL in nats from the Gaussian of `moments` (B, ..., 2C) to `other`, or to N(0, I): (B,)."""
    mean, log_variance = split_moments(moments)
    mean_q, log_variance_q = jnp.zeros_like(mean), jnp.zeros_like(mean)
    if other is not None:
        mean_q, log_variance_q = split_moments(other)
    return normal_kl(mean, log_variance, mean_q, log_variance_q).sum(range(1, mean.ndim))


def negative_log_likelihood(moments: Array, sample: Array) -> Array:
    """-log N(sample; moments) in nats, summed per example: (B, ..., 2C), (B, ..., C) -> (B,)."""
    mean, log_variance = split_moments(moments)
    scaled = jnp.square(sample - mean) * jnp.exp(-log_variance)
    return 0.5 * (jnp.log(2.0 * jnp.pi) + log_variance + scaled).sum(range(1, mean.ndim))


class AutoencoderKL(Autoencoder):
    """KL-regularised autoencoder: the fields of `Autoencoder`, M = 2C, and

    Attributes:
        log_variance: where the posterior's log-variance starts. The published models start near 0,
            where the noise drowns the latents until the encoder has learnt to shout; a short run
            cannot afford that.
    """

    log_variance: float = 0.0

    def setup(self) -> None:
        def bias(key: Array, shape: tuple[int], dtype: jnp.dtype) -> Array:
            start = uniform_fan_in(2 * self.z_channels)(key, shape, dtype)
            return start.at[self.channels :].add(self.log_variance)

        self.make_networks(moments_per_channel=2, bias_init=bias)

    def sample(self, moments: Array, keys: Array) -> Array:
        """Draws scaled latents (B, h, w, C) from moments (B, h, w, 2C) with (B,) keys."""
        noise = random.normal(keys, (*moments.shape[1:-1], self.channels))
        return self.scaled(sample_gaussian(moments, noise))

    def mode(self, moments: Array) -> Array:
        """The scaled mean: (B, h, w, 2C) -> (B, h, w, C)."""
        return self.scaled(split_moments(moments)[0])

    def autoencode(self, images: Array, keys: Array, *, train: bool = False) -> tuple[Array, dict]:
        """Images (B, H, W, 3), (B,) keys -> reconstruction of the same shape and `aux`.

        `aux`: 'kl' (B,) nats to N(0, I), 'latents' (B, h, w, C) before scaling.
        """
        moments = self.moments(images, train=train)
        noise = random.normal(keys, (*moments.shape[1:-1], self.channels))
        z = sample_gaussian(moments, noise)
        aux = {"kl": kl_divergence(moments), "latents": z}
        return self.decode_unscaled(z, train), aux
