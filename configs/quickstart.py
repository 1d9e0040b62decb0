"""Emoji faces, 64x64, by class: both stages in under ten minutes on two CPU cores.

python -m ldm_jax.train --config=configs/quickstart.py

The 166 smileys of the embedded set, labelled by their 16 kinds, as KL latents of 8x8x8. docs/
quickstart.md says how each choice was made.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(fields=("label",), resolution=64, cache_latents=True)
    base.use_small_model(c)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=256, slot="vector")
    c.cond_drop_rate = 0.1
    c.sample.update(guidance_scale=2.0, nearest=True)
    return base.finish(c, arg)
