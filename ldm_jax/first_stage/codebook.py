"""Codebooks that are kept in use: running averages of each code's use and of its latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ldm_jax.types import Array

# `use` (K,): how often each code is the nearest, 1 if all codes are used alike; `total` (K, C), in
# the same units: the sum of the latents that it stood for.
Averages = dict[str, Array]
DEAD = 0.05  # a code with less use than that counts as unused


def start_averages(codebook: Array) -> Averages:
    """Averages as if every code (K, C) had been used alike, and for itself."""
    return {"use": jnp.ones(len(codebook)), "total": codebook}


def update_averages(averages: Averages, z: Array, codes: Array, decay: Array | float) -> Averages:
    """Takes in the latents (B, h, w, C) of a batch and the codes (B, h, w) nearest to them.

    `decay` should be small at first, so that what the averages start from is soon forgotten.
    """
    flat, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1)
    even = len(codes) / len(averages["use"])
    use = jnp.zeros_like(averages["use"]).at[codes].add(1.0) / even
    total = jnp.zeros_like(averages["total"]).at[codes].add(flat) / even
    new = {"use": use, "total": total}
    return jax.tree.map(lambda old, now: decay * old + (1 - decay) * now, averages, new)


def averaged_codebook(averages: Averages, codebook: Array) -> Array:
    """Each code as the mean of its latents (van den Oord et al. 2017, appendix A.1): (K, C)."""
    use = averages["use"][:, None]
    # Long unused, both have shrunk to nothing: the code stays where it was.
    return jnp.where(use > 1e-12, averages["total"] / jnp.maximum(use, 1e-12), codebook)


def reset_unused(
    codebook: Array, averages: Averages, z: Array, key: Array, least: float
) -> tuple[Array, Averages]:
    """Puts codes with a use below `least` at random latents of z (B, h, w, C), used alike again.

    Dhariwal et al. 2020, section 3.1.
    """
    flat = z.reshape(-1, z.shape[-1])
    drawn = flat[jax.random.randint(key, (len(codebook),), 0, len(flat))]
    unused = averages["use"] < least
    use = jnp.where(unused, 1.0, averages["use"])
    codebook = jnp.where(unused[:, None], drawn, codebook)
    total = jnp.where(unused[:, None], drawn, averages["total"])
    return codebook, {"use": use, "total": total}


def share_alive(averages: Averages) -> Array:
    """The share of codes that are in use."""
    return (averages["use"] >= DEAD).mean()
