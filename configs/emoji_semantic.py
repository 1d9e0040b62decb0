"""Semantic synthesis on composed scenes, 64x64: maps of six classes and the ground.

python -m ldm_jax.train --config=configs/emoji_semantic.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="scenes", fields=("segmentation",), resolution=64, flip=False)
    c.data.split, c.first_stage.eval.split = "train[:90%]", "test"
    base.use_small_model(c)
    c.first_stage.update(z_channels=16, channels=16, stats_images=2000)
    c.first_stage.train.steps = 900
    c.conditioners = ("segmentation",)
    c.segmentation.update(num_classes=7, channels=7, stages=3)
    c.train.update(steps=1500, picture_every=500, checkpoint_every=500)
    c.ema_decay = 0.995
    return base.finish(c, arg)
