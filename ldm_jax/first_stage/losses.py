"""Training loss of the autoencoders: reconstruction and the regulariser of the bottleneck."""

from __future__ import annotations

import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.types import Array


def pixel_error(reconstruction: Array, images: Array, loss: str) -> Array:
    """Error of each element, (B, H, W, 3) -> the same; `loss` is 'l1' or 'l2'."""
    difference = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    if loss == "l1":
        return jnp.abs(difference)
    if loss == "l2":
        return jnp.square(difference)
    raise UserError(f"unknown reconstruction loss '{loss}': choose l1 or l2")


def kl_loss(error: Array, aux: dict[str, Array], kl_weight: float) -> tuple[Array, dict]:
    """Errors (B, H, W, 3) and the `aux` of AutoencoderKL -> scalar loss and metrics.

    Both terms are summed over an example and averaged over the batch (Rombach et al. 2022,
    appendix G), so that the weight of the KL term is far smaller than it looks.
    """
    reconstruction = error.sum((1, 2, 3)).mean()
    kl = aux["kl"].mean()
    metrics = {"reconstruction": reconstruction, "kl": kl}
    metrics["kl_per_element"] = kl / aux["latents"][0].size
    return reconstruction + kl_weight * kl, metrics


def vq_loss(error: Array, aux: dict[str, Array], codebook_weight: float) -> tuple[Array, dict]:
    """Errors (B, H, W, 3) and the `aux` of VQModel -> scalar loss and metrics.

    Both terms are means over all elements. Metrics: the share of codes that the batch used, and
    the perplexity of their distribution, from 1 to the number of codes.
    """
    reconstruction, codebook = error.mean(), aux["codebook"].mean()
    counts = aux["code_counts"]
    share = counts / counts.sum()
    entropy = -(share * jnp.log(jnp.where(counts > 0, share, 1.0))).sum()
    metrics = {"reconstruction": reconstruction, "codebook": codebook}
    metrics |= {"code_usage": (counts > 0).mean(), "code_perplexity": jnp.exp(entropy)}
    return reconstruction + codebook_weight * codebook, metrics


def autoencoder_loss(
    reconstruction: Array,
    images: Array,
    aux: dict[str, Array],
    *,
    kind: str,
    loss: str = "l1",
    kl_weight: float = 1e-6,
    codebook_weight: float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Loss of an `autoencode` call: images (B, H, W, 3) and its two results -> scalar, metrics.

    Args:
        reconstruction: (B, H, W, 3).
        images: (B, H, W, 3) in [-1, 1].
        aux: the dictionary that `autoencode` returned.
        kind: 'kl' or 'vq'.
        loss: of the reconstruction, 'l1' or 'l2'.
        kl_weight: of the KL term ('kl').
        codebook_weight: of the codebook and commitment term ('vq').

    Returns:
        The loss and scalar metrics, among them 'reconstruction_mae', the mean absolute error.

    Raises:
        UserError: `kind` or `loss` is unknown.
    """
    error = pixel_error(reconstruction, images, loss)
    if kind == "kl":
        total, metrics = kl_loss(error, aux, kl_weight)
    elif kind == "vq":
        total, metrics = vq_loss(error, aux, codebook_weight)
    else:
        raise UserError(f"no training loss for a first stage of kind '{kind}': choose kl or vq")
    return total, metrics | {"reconstruction_mae": pixel_error(reconstruction, images, "l1").mean()}
