"""Layout to image on composed scenes, 64x64: labelled boxes of six classes.

python -m ldm_jax.train --config=configs/emoji_layout.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="scenes", fields=("boxes",), resolution=64, flip=False)
    c.data.split, c.first_stage.eval.split = "train[:90%]", "test"
    c.denoiser.kind = "dit"
    base.use_small_model(c)
    # A transformer knows where its tokens are; a UNet of so few steps places objects at random.
    c.denoiser.update(width=128, depth=4, head_dim=32)
    c.denoiser.dit.update(patch=1, positions="sincos", context="joint")
    c.first_stage.stats_images = 2000
    c.first_stage.train.steps = 400
    c.conditioners = ("layout",)
    # Corners on a grid of 11 x 11: with a finer one each would be seen too rarely in a short run.
    c.layout.update(vocab_size=122, width=128, depth=2, length=18, null=True)
    c.train.update(steps=1500, picture_every=750, checkpoint_every=500)
    c.ema_decay = 0.995
    c.cond_drop_rate = 0.1
    c.sample.guidance_scale = 2.0
    return base.finish(c, arg)
