"""Inpainting of emoji, 64x64, with free-form holes.

python -m ldm_jax.train --config=configs/emoji_inpainting.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", fields=("masked_image", "mask"), mask="mixed", resolution=64)
    c.data.split, c.first_stage.eval.split = "train[:90%]", "train[90%:]"
    base.use_small_model(c)
    c.first_stage.update(z_channels=16, channels=16)
    c.first_stage.train.steps = 900
    c.conditioners = ("inpainting",)
    c.train.steps = 1200
    return base.finish(c, arg)
