"""Emoji faces, 64x64, without a condition: for guided inpainting, colourisation and strokes.

python -m ldm_jax.train --config=configs/emoji_unconditional.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", resolution=64)
    c.data.split, c.first_stage.eval.split = "train[:90%]", "train[90%:]"
    c.data.cache_latents = True
    base.use_small_model(c)
    c.train.steps = 900
    return base.finish(c, arg)
