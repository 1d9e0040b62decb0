"""Mean and spread of latents, from which `shift` and `scale` of a first stage are set."""

from __future__ import annotations

import numpy as np

from ldm_jax.errors import UserError


def first_batch_scale(z: np.ndarray) -> float:
    """1 / std over all elements of a first batch of unscaled latents (B, h, w, C).

    The paper's rule for KL first stages (Rombach et al. 2022, appendix G), whose formula is one
    number for all channels; the standard deviation is the unbiased one, as in the original code.
    """
    return float(1.0 / np.std(np.asarray(z, np.float64), ddof=1))


class LatentStatistics:
    """Running mean and variance of each latent channel, in float64, batch by batch."""

    def __init__(self, channels: int) -> None:
        self.count = 0  # elements per channel
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)  # summed squared distances to the mean

    def add(self, z: np.ndarray) -> None:
        """Takes in a batch of unscaled latents (B, h, w, C)."""
        flat = np.asarray(z, np.float64).reshape(-1, len(self.mean))
        if not len(flat):
            return
        mean, count = flat.mean(0), self.count + len(flat)
        distance = mean - self.mean
        # Chan et al. 1983: joins two sets without the cancellation of a sum of squares.
        self.squares += ((flat - mean) ** 2).sum(0)
        self.squares += distance**2 * self.count * len(flat) / count
        self.mean = self.mean + distance * len(flat) / count
        self.count = count

    def result(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns `shift` (C,) and `scale` (C,) float32, so that (z - shift) * scale is of size 1.

        'scalar' shifts nothing and divides by the standard deviation over all channels, as the
        paper does; 'channel' brings each channel to mean 0 and standard deviation 1.

        Raises:
            UserError: unknown mode, no latents, or latents that do not vary.
        """
        channels = len(self.mean)
        if mode not in ("scalar", "channel"):
            raise UserError(f"unknown latent statistics '{mode}': choose scalar or channel")
        if self.count < 2:
            raise UserError("cannot measure the scale of the latents: no latents were given")
        if mode == "channel":
            shift, variance = self.mean, self.squares / (self.count - 1)
        else:
            shift = np.zeros(channels)
            between = self.count * ((self.mean - self.mean.mean()) ** 2).sum()
            total = (self.squares.sum() + between) / (self.count * channels - 1)
            variance = np.full(channels, total)
        if not np.all(variance > 0) or not np.all(np.isfinite(variance)):
            raise UserError(
                "cannot scale latents that are constant or not finite: is the first stage trained?"
            )
        return shift.astype(np.float32), (1.0 / np.sqrt(variance)).astype(np.float32)
