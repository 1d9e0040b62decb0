"""What the classifier of noisy latents of a config must obey; the rest is in `checks`."""

from __future__ import annotations

from ml_collections import ConfigDict

from ldm_jax.errors import UserError


def check_classifier(c: ConfigDict, latent_side: int) -> None:
    """Checks that there is what a classifier is trained on; `latent_side` is that of the latents.

    Raises:
        UserError: there is not; it names the key.
    """
    steps, unit = c.classifier.train.steps, 2 ** (len(c.classifier.mult) - 1)
    if c.classifier.train.picture_every:
        raise UserError(
            f"config.classifier.train.picture_every is {c.classifier.train.picture_every}, but a "
            "classifier has nothing to show: set it to 0"
        )
    if steps == 0:
        return
    if c.train.steps == 0:
        raise UserError(
            f"config.classifier.train.steps is {steps}, but config.train.steps is 0, and there is "
            "no diffusion model to guide: set one of them"
        )
    if "label" not in c.data.fields:
        raise UserError(
            "config.classifier.train.steps is above 0: add 'label', which the classifier is "
            "trained on, to config.data.fields"
        )
    if latent_side % unit:
        raise UserError(
            f"config.classifier.mult has {len(c.classifier.mult)} levels, which divide the latents "
            f"by {unit}, but these have a side of {latent_side}: use fewer"
        )
