"""What the buckets of a config must obey; the rest is in `checks`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

MOST_BUCKETS = 64  # each is compiled by itself
MOST_PIXELS = 2**16  # of a side
SQUARE_FIELDS = ("masked_image", "mask")  # holes are drawn in squares


def check_buckets(c: ConfigDict, downsampling: int, unit: int) -> None:
    """Checks the sizes of data.buckets, and that what is trained can have several.

    Args:
        c: the config.
        downsampling: pixels per latent along one side.
        unit: latents per side of which the denoiser takes multiples.

    Raises:
        UserError: the key and the rule.
    """
    sizes = c.data.buckets
    if not sizes:
        return
    if not all(_is_size(size) for size in sizes) or len(set(sizes)) < len(sizes):
        raise UserError(
            f"config.data.buckets is {tuple(sizes)}, but must hold different pairs (height, width) "
            f"of 1 to {MOST_PIXELS} pixels, written as ((64,64),(96,64))"
        )
    if len(sizes) > MOST_BUCKETS:
        raise UserError(
            f"config.data.buckets has {len(sizes)} sizes, each compiled by itself: use at most "
            f"{MOST_BUCKETS}"
        )
    if c.data.source.startswith("latents:"):
        raise UserError(
            "config.data.buckets cannot be used with data.source='latents:...', whose images are "
            "encoded at one size: set it to ()"
        )
    for field in SQUARE_FIELDS:
        if field in c.data.fields:
            raise UserError(
                f"config.data.buckets cannot be used with the field '{field}', whose holes are "
                "drawn in squares: set it to ()"
            )
    if c.classifier.train.steps > 0:
        unit = max(unit, 2 ** (len(c.classifier.mult) - 1))
    rules = {downsampling * unit: "what the networks divide them by"}
    if "low_res" in c.data.fields:
        rules[c.data.low_res.factor] = "data.low_res.factor"
    for size in sizes:
        for factor, origin in rules.items():
            if any(side % factor for side in size):
                raise UserError(
                    f"config.data.buckets has {size}, but sides must be multiples of {factor}, "
                    f"{origin}"
                )


def _is_size(size: Any) -> bool:
    pair = isinstance(size, tuple) and len(size) == 2
    return pair and all(type(side) is int and 1 <= side <= MOST_PIXELS for side in size)
