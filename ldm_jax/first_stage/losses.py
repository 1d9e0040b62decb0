"""Training loss of the autoencoders: reconstruction, the regulariser of the bottleneck, and the
discriminator's share with its adaptive weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.types import Array

Metrics = dict[str, Array]
# From images and their reconstruction to distances (B,): `LPIPS`, with its weights.
Perceptual = Callable[[Array, Array], Array]
LARGEST_WEIGHT = 1e4


def pixel_error(reconstruction: Array, images: Array, loss: str) -> Array:
    """Error of each element, (B, H, W, 3) -> the same; `loss` is 'l1' or 'l2'."""
    difference = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    if loss == "l1":
        return jnp.abs(difference)
    if loss == "l2":
        return jnp.square(difference)
    raise UserError(f"unknown reconstruction loss '{loss}': choose l1 or l2")


def reconstruction_loss(
    reconstruction: Array,
    images: Array,
    *,
    kind: str,
    loss: str = "l1",
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    log_variance: Array | float = 0.0,
) -> tuple[Array, Metrics]:
    """The reconstruction term of each example, (B,), and metrics; its mean is what is minimised.

    The perceptual distance of an example is added to the error of each of its elements, and the
    sum e becomes e / exp(log_variance) + log_variance. 'kl' then sums over the elements of an
    example, so that the KL term weighs far less than it looks, 'vq' and 'fsq' average (Rombach et
    al. 2022, appendix G).

    Args:
        reconstruction: (B, H, W, 3).
        images: (B, H, W, 3) in [-1, 1].
        kind: 'kl', 'vq' or 'fsq'.
        loss: of the pixels, 'l1' or 'l2'.
        perceptual: distance of a batch to its reconstruction; None leaves the term out.
        perceptual_weight: of that distance.
        log_variance: of the observation, one number that may be learnt; 0 in the published models.

    Returns:
        (B,) and the metrics 'reconstruction', 'reconstruction_mae' and, with a perceptual term,
        'perceptual' and 'reconstruction_error', the mean error of an element with that term.

    Raises:
        UserError: `kind` or `loss` is unknown.
    """
    if kind not in ("kl", "vq", "fsq"):
        raise UserError(f"no training loss for a first stage of kind '{kind}': choose kl, vq, fsq")
    error = pixel_error(reconstruction, images, loss)
    metrics = {"reconstruction_mae": pixel_error(reconstruction, images, "l1").mean()}
    if perceptual is not None:
        distance = perceptual(images, reconstruction)
        error = error + perceptual_weight * distance[:, None, None, None]
        metrics |= {"perceptual": distance.mean(), "reconstruction_error": error.mean()}
    negative_log_likelihood = error * jnp.exp(-log_variance) + log_variance
    axes = (1, 2, 3)
    total = (
        negative_log_likelihood.sum(axes) if kind == "kl" else negative_log_likelihood.mean(axes)
    )
    return total, metrics | {"reconstruction": total.mean()}


def regulariser(
    aux: Metrics, *, kind: str, kl_weight: float = 1e-6, codebook_weight: float = 1.0
) -> tuple[Array, Metrics]:
    """The `aux` of an `autoencode` call -> the weighted term of the bottleneck and metrics.

    'kl': nats per example, averaged over the batch. 'vq': the codebook term, a mean over all
    elements; among the metrics the share of codes that the batch used and the perplexity of their
    distribution, from 1 to the number of codes. 'fsq': no term, the same metrics.
    """
    if kind == "kl":
        kl = aux["kl"].mean()
        return kl_weight * kl, {"kl": kl, "kl_per_element": kl / aux["latents"][0].size}
    usage, perplexity = code_usage(aux["code_counts"])
    metrics = {"code_usage": usage, "code_perplexity": perplexity}
    if kind == "fsq":
        return jnp.float32(0.0), metrics
    codebook = aux["codebook"].mean()
    return codebook_weight * codebook, metrics | {"codebook": codebook}


def code_usage(counts: Array) -> tuple[Array, Array]:
    """How often each code was used, (K,) -> the share of used codes, and their perplexity."""
    share = counts / counts.sum()
    entropy = -(share * jnp.log(jnp.where(counts > 0, share, 1.0))).sum()
    return (counts > 0).mean(), jnp.exp(entropy)


def adversarial_factor(step: Array, start: int, factor: float = 1.0, ramp: int = 0) -> Array:
    """0 before step `start`, then `factor`, reached in a straight line of `ramp` steps."""
    share = jnp.minimum(1.0, (step - start + 1) / (ramp + 1))
    return jnp.where(step < start, 0.0, factor * share)


def adaptive_weight(
    pull_back: Callable[[Array], Array], reconstruction_grad: Array, adversarial_grad: Array
) -> Array:
    """Brings the adversarial gradient to the length of the other (Esser et al. 2021, equation 7).

    Both are compared at the last layer of the decoder, where one weight gradient each is all they
    cost; nothing is differentiated through the result.

    Args:
        pull_back: a gradient with respect to the reconstruction, (B, H, W, 3), to that of the last
            layer's kernel. Under `jit` it may pick the kernel out of the whole decoder's `vjp`:
            what else that would compute is dropped.
        reconstruction_grad: gradient of the reconstruction term with respect to the reconstruction.
        adversarial_grad: gradient of the generator's term.

    Returns:
        A scalar in [0, 1e4].
    """
    grads = pull_back(reconstruction_grad), pull_back(adversarial_grad)
    reference, adversarial = (jnp.sqrt(jnp.square(g.astype(jnp.float32)).sum()) for g in grads)
    weight = reference / (adversarial + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, LARGEST_WEIGHT))


class OutputLoss(NamedTuple):
    """What the reconstruction costs, and which way it should move.

    Attributes:
        value: the loss without the term of the bottleneck, a scalar.
        reconstruction_grad: its gradient with respect to the reconstruction, (B, H, W, 3).
        log_variance_grad: its gradient with respect to `log_variance`, a scalar.
        metrics: those of the reconstruction, and 'log_variance', 'adversarial', 'adaptive_weight'
            (times `weight`) and 'adversarial_factor'.
    """

    value: Array
    reconstruction_grad: Array
    log_variance_grad: Array
    metrics: Metrics


def output_loss(
    reconstruction: Array,
    log_variance: Array,
    likelihood: Callable[[Array, Array], tuple[Array, Metrics]],
    adversarial: Callable[[Array], Array],
    pull_back: Callable[[Array], Array],
    *,
    weight: float,
    factor: Array,
    example_weights: Array | None = None,
) -> OutputLoss:
    """Reconstruction and adversarial terms, joined by the adaptive weight, and their gradient.

    The gradient stops at the reconstruction, so that a training step pulls it back through the
    decoder once, together with that of the bottleneck's term:

        (reconstruction, term), pull, aux = jax.vjp(autoencode, params, has_aux=True)
        loss = output_loss(reconstruction, ..., pull_back=last kernel's part of pull((grad, 0)))
        grads = pull((loss.reconstruction_grad, 1))

    Args:
        reconstruction: (B, H, W, 3).
        log_variance: scalar.
        likelihood: reconstruction and log-variance -> (B,) and metrics: `reconstruction_loss`.
        adversarial: reconstruction -> the generator's term, a scalar.
        pull_back: see `adaptive_weight`.
        weight: of the adversarial term, on top of the adaptive one.
        factor: of the adversarial term at this step: `adversarial_factor`.
        example_weights: (B,) of the examples in the reconstruction term; the adaptive weight is
            that of the term without them, as in the original code.
    """
    per_example, pull_likelihood, metrics = jax.vjp(
        likelihood, reconstruction, log_variance, has_aux=True
    )
    share = jnp.full_like(per_example, 1.0 / per_example.size)
    grad, log_variance_grad = pull_likelihood(share)
    adversarial_value, adversarial_grad = jax.value_and_grad(adversarial)(reconstruction)
    adaptive = weight * adaptive_weight(pull_back, grad, adversarial_grad)
    if example_weights is not None:
        share = share * example_weights
        grad, log_variance_grad = pull_likelihood(share)
    strength = adaptive * factor
    metrics |= {
        "log_variance": log_variance,
        "adversarial": adversarial_value,
        "adaptive_weight": adaptive,
        "adversarial_factor": factor,
    }
    return OutputLoss(
        (share * per_example).sum() + strength * adversarial_value,
        grad + strength * adversarial_grad,
        log_variance_grad,
        metrics,
    )
