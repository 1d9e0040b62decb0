"""Mean and spread of latents, from which `shift` and `scale` of a first stage are set."""

from __future__ import annotations

import numpy as np

from ldm_jax.errors import UserError

# What a scale can be made of: the first training batch, or a whole set as one or by channel.
RULES = ("first_batch", "scalar", "channel")


class LatentStatistics:
    """Running mean and variance of unscaled latents in float64, batch by batch.

    Standard deviations are the unbiased ones, as in the original code.

    Attributes:
        images: taken in so far.
        channel_mean: (C,).
    """

    def __init__(self, channels: int) -> None:
        self.images = 0
        self.channel_mean = np.zeros(channels)
        self._count = 0  # elements per channel
        self._squares = np.zeros(channels)  # summed squared distances to the mean

    def add(self, z: np.ndarray) -> None:
        """Takes in a batch of unscaled latents (B, h, w, C)."""
        flat = np.asarray(z, np.float64).reshape(-1, len(self.channel_mean))
        if not len(flat):
            return
        mean, count = flat.mean(0), self._count + len(flat)
        distance = mean - self.channel_mean
        # Chan et al. 1983: joins two sets without the cancellation of a sum of squares.
        self._squares += ((flat - mean) ** 2).sum(0)
        self._squares += distance**2 * self._count * len(flat) / count
        self.channel_mean = self.channel_mean + distance * len(flat) / count
        self._count = count
        self.images += len(z)

    @property
    def mean(self) -> float:
        """Over all elements."""
        return float(self.channel_mean.mean())

    @property
    def std(self) -> float:
        """Over all elements; NaN before there are any."""
        between = self._count * ((self.channel_mean - self.mean) ** 2).sum()
        count = self._count * len(self.channel_mean)
        return _std(self._squares.sum() + between, count)

    @property
    def channel_std(self) -> np.ndarray:
        """Of each channel, (C,); NaN before there are any elements."""
        return np.array([_std(squares, self._count) for squares in self._squares])

    def result(self, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns `shift` (C,) and `scale` (C,) float32, so that (z - shift) * scale is of size 1.

        'scalar' shifts nothing and divides by the standard deviation over all channels; so does
        'first_batch', which is the rule of the paper (Rombach et al. 2022, appendix G) if no more
        than the first batch was taken in. 'channel' brings each channel to mean 0 and standard
        deviation 1.

        Raises:
            UserError: unknown rule, no latents, or latents that do not vary.
        """
        channels = len(self.channel_mean)
        if rule not in RULES:
            raise UserError(f"unknown latent statistics '{rule}': choose {', '.join(RULES)}")
        if self._count < 2:
            raise UserError("cannot measure the scale of the latents: no latents were given")
        if rule == "channel":
            shift, std = self.channel_mean, self.channel_std
        else:
            shift, std = np.zeros(channels), np.full(channels, self.std)
        if not np.all(std > 0) or not np.all(np.isfinite(std)):
            raise UserError(
                "cannot scale latents that are constant or not finite: is the first stage trained?"
            )
        return shift.astype(np.float32), (1.0 / std).astype(np.float32)

    def summary(self) -> dict[str, int | float | list[float]]:
        """The statistics as JSON can hold them."""
        return {
            "images": self.images,
            "mean": self.mean,
            "std": self.std,
            "channel_mean": self.channel_mean.tolist(),
            "channel_std": self.channel_std.tolist(),
        }


def _std(squares: float, count: int) -> float:
    """From the squared distances to the mean of `count` numbers."""
    return float(np.sqrt(squares / (count - 1))) if count > 1 else np.nan
