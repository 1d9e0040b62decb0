"""Layout to image on composed scenes, 64x64: labelled boxes of six classes.

python -m ldm_jax.train --config=configs/emoji_layout.py

A start for a CPU: after the 560 steps here, colours gather where the boxes are, and no more.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="scenes", fields=("boxes",), resolution=64, flip=False)
    c.data.split = "train[:4000]"
    base.use_small_model(c)
    c.conditioners = ("layout",)
    c.layout.update(vocab_size=401, width=128, depth=2, length=18, null=True)
    c.denoiser.cross_attention = True
    c.cond_drop_rate = 0.1
    c.sample.guidance_scale = 2.0
    return base.finish(c, arg)
