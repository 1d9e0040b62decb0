"""Semantic synthesis on composed scenes, 64x64: maps of six classes and the ground.

python -m ldm_jax.train --config=configs/emoji_semantic.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="scenes", fields=("segmentation",), resolution=64, flip=False)
    c.data.split = "train[:4000]"
    base.use_small_model(c)
    c.conditioners = ("segmentation",)
    c.segmentation.update(num_classes=7, channels=7, stages=3)
    return base.finish(c, arg)
