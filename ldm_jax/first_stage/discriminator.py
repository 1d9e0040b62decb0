"""The patch discriminator of the autoencoders and its losses (Isola et al. 2017; Esser et al.
2021, section 3.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.batch_norm import BatchNorm
from ldm_jax.nn.layers import along_last, spread, uniform_fan_in
from ldm_jax.types import Array

SLOPE = 0.2  # of the leaky rectifiers


class Conv4x4(nn.Module):
    """4x4 convolution with padding 1: (B, H, W, K) -> (B, H', W', features).

    The kernel starts from N(0, 0.02), the bias as that of any other layer of the original code.
    """

    features: int
    stride: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            init = uniform_fan_in(16 * x.shape[-1])
            bias = self.param("bias", init, (self.features,), jnp.float32)
            y = y + spread(along_last(bias, 4), y)
        return y


class PatchDiscriminator(nn.Module):
    """Says of each patch whether it is real: images (B, H, W, C) -> logits (B, h, w, 1) float32.

    h = H // 2^layers - 2. With `train` the normalisations use the statistics of this call's batch,
    so real and generated images are separate calls; each updates the collection 'batch_stats' if
    that is mutable.

    Attributes:
        width: channels of the first layer; they double per layer up to 8 * width.
        layers: of stride 2; two more of stride 1 follow.
        dtype: of the convolutions; parameters, statistics and logits are float32.

    Raises:
        UserError: the images are too small for one patch.
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        smallest = 3 * 2**self.layers
        if min(images.shape[1:3]) < smallest:
            raise UserError(
                f"a discriminator with {self.layers} layers needs images of at least "
                f"{smallest}x{smallest}, got {images.shape[1]}x{images.shape[2]}: use fewer layers"
            )
        h = Conv4x4(self.width, 2, True, self.dtype, name="conv_0")(images)
        h = nn.leaky_relu(h, SLOPE)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            features = self.width * min(2**i, 8)
            h = Conv4x4(features, stride, False, self.dtype, name=f"conv_{i}")(h)
            h = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(h, train), SLOPE)
        return Conv4x4(1, 1, True, self.dtype, name="conv_out")(h).astype(jnp.float32)


def generator_loss(logits: Array) -> Array:
    """-mean of the logits (B, h, w, 1) of generated images: what the autoencoder minimises."""
    return -logits.mean()


def discriminator_loss(
    real: Array, generated: Array, loss: str = "hinge", weights: Array | None = None
) -> Array:
    """Loss of the discriminator from its logits (B, h, w, 1) of real and generated images.

    Args:
        real: logits of real images.
        generated: logits of generated images.
        loss: 'hinge' (Lim & Ye 2017) or 'vanilla' (Goodfellow et al. 2014), each halved.
        weights: (B,) of the examples, of which only the ratios count; None weighs all alike.

    Raises:
        UserError: `loss` is unknown.
    """
    if loss == "hinge":
        errors = nn.relu(1.0 - real), nn.relu(1.0 + generated)
    elif loss == "vanilla":
        errors = nn.softplus(-real), nn.softplus(generated)
    else:
        raise UserError(f"unknown discriminator loss '{loss}': choose hinge or vanilla")
    per_example = 0.5 * sum(error.mean((1, 2, 3)) for error in errors)
    if weights is None:
        return per_example.mean()
    return (weights * per_example).sum() / weights.sum()


def lecam_loss(real: Array, generated: Array, averages: dict[str, Array]) -> Array:
    """Holds the logits near the other side's running average: a scalar (Tseng et al. 2021, eq. 5).

    Args:
        real: logits (B, h, w, 1) of real images.
        generated: of generated images.
        averages: running means of both, 'real' and 'generated', scalars.
    """
    apart = jnp.square(real - averages["generated"]).mean()
    return apart + jnp.square(generated - averages["real"]).mean()
