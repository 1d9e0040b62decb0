"""Super-resolution x4 of emoji, 16x16 to 64x64.

python -m ldm_jax.train --config=configs/emoji_super_resolution.py
python -m ldm_jax.train --config=configs/emoji_super_resolution.py --config.data.low_res.factor=8
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", fields=("low_res",), resolution=64)
    c.data.split, c.first_stage.eval.split = "train[:90%]", "train[90%:]"
    c.data.low_res.update(factor=4, degradation="bicubic")
    base.use_small_model(c)
    c.first_stage.update(z_channels=16, channels=16)
    c.first_stage.train.steps = 900
    c.conditioners = ("low_res",)
    c.train.steps = 1000
    return base.finish(c, arg)
