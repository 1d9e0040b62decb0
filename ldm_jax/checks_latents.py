"""What a config must obey whose images are encoded once; the rest is in `checks`."""

from __future__ import annotations

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

# Fields that are drawn anew whenever an example is seen, and those that go with places in it.
DRAWN = ("low_res", "noise_level", "masked_image", "mask")
PLACED = ("boxes", "segmentation")


def check_latents(c: ConfigDict) -> None:
    """Checks the use of data.cache_latents and of data.source='latents:...'.

    Raises:
        UserError: the key and the rule.
    """
    if c.data.source.startswith("latents:"):
        if c.data.cache_latents:
            raise UserError(
                "config.data.cache_latents is for images, and data.source='latents:...' has them "
                "encoded: set it to False"
            )
        if c.sample.nearest:
            raise UserError(
                "config.sample.nearest compares images, and data.source='latents:...' has none: "
                "set it to False"
            )
    if not c.data.cache_latents:
        return
    if c.data.crop != "center":
        raise UserError("config.data.cache_latents needs config.data.crop='center'")
    for field in c.data.fields:
        if field in DRAWN:
            raise UserError(
                f"config.data.cache_latents cannot be used with the field '{field}', which is made "
                "anew each time: set it to False"
            )
        if c.data.flip and field in PLACED:
            raise UserError(
                f"config.data.cache_latents needs config.data.flip=False for the field '{field}'"
            )
