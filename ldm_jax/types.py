"""Types shared by every part of the package."""

from __future__ import annotations

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class Condition:
    """What a denoiser is told besides `x_t` and `t`; a slot that is not used is None.

    Attributes:
        context: (B, L, D) tokens for cross-attention.
        context_mask: (B, L) bool, True where a token may be attended to; None attends to all.
        concat: (B, h, w, K) maps that are concatenated to `x_t` along the channels.
        vector: (B, D) that is added to the time embedding.
    """

    context: Array | None = None
    context_mask: Array | None = None
    concat: Array | None = None
    vector: Array | None = None


@flax.struct.dataclass
class Prediction:
    """A denoised estimate in both forms a sampler may need, each of the shape of `x_t`."""

    x0: Array
    eps: Array

    @property
    def velocity(self) -> Array:
        """eps - x0, dx_t/dt of a rectified flow (Liu et al. 2023)."""
        return self.eps - self.x0
