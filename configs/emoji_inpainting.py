"""Inpainting of emoji, 64x64, with free-form holes.

python -m ldm_jax.train --config=configs/emoji_inpainting.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", split="train[:90%]", resolution=64)
    c.data.update(fields=("masked_image", "mask"), mask="mixed")
    base.use_small_model(c)
    c.conditioners = ("inpainting",)
    return base.finish(c, arg)
